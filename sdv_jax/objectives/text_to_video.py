"""Plain text- and image-to-video training on clips, with still images mixed in: pretraining or full fine-tuning."""

import jax
import jax.numpy as jnp

from sdv_jax.objectives import denoising
from sdv_jax.objectives.denoising import Batch, Denoiser, Objective
from sdv_jax.typing import Array, Float, Key


def loss(
    model: Denoiser, clips: Batch, images: Batch | None, empty_text: Array, key: Key[Array, ""], *,
    objective: Objective, image_weight: float, first_frame: float = 0.0, timesteps: Array | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """(1 - image_weight) · loss on the clips + image_weight · loss on the images, or the clips alone.

    The first ones of the clips, a share `first_frame` of them, are given their first frame, the others only their
    caption; each clip counts alike. `timesteps` [b] of the clips are drawn where they are not given.
    """
    clip_key, image_key = jax.random.split(key)
    given = round(first_frame * clips["text"].shape[0])
    clip_loss = _clips(model, clips, empty_text, clip_key, objective, given, timesteps)
    if images is None:
        return clip_loss
    image_loss = _plain(model, images, empty_text, image_key, objective)
    return (1 - image_weight) * clip_loss + image_weight * image_loss


def _clips(
    model: Denoiser, clips: Batch, empty_text: Array, key: Key[Array, ""], objective: Objective, first_frames: int,
    timesteps: Array | None,
) -> Float[Array, ""]:  # fmt: skip
    total = clips["text"].shape[0]
    if first_frames in (0, total):
        return _plain(model, clips, empty_text, key, objective, timesteps, first_frame=first_frames > 0)
    given = {name: rows[:first_frames] for name, rows in clips.items()}
    plain = {name: rows[first_frames:] for name, rows in clips.items()}
    given_key, plain_key = jax.random.split(key)
    given_times, plain_times = (timesteps, timesteps) if timesteps is None else jnp.split(timesteps, [first_frames])
    given_loss = _plain(model, given, empty_text, given_key, objective, given_times, first_frame=True)
    plain_loss = _plain(model, plain, empty_text, plain_key, objective, plain_times)
    return (first_frames * given_loss + (total - first_frames) * plain_loss) / total


def _plain(
    model: Denoiser, batch: Batch, empty_text: Array, key: Key[Array, ""], objective: Objective,
    timesteps: Array | None = None, *, first_frame: bool = False,
) -> Float[Array, ""]:  # fmt: skip
    latent_key, text_key, loss_key = jax.random.split(key, 3)
    latents = denoising.draw_latents(batch, latent_key, objective)
    text = denoising.draw_text(batch, empty_text, text_key, objective)
    return denoising.loss(
        model, latents, text, loss_key, objective=objective, first_frame=first_frame, timesteps=timesteps
    )
