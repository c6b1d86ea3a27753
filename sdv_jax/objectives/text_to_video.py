"""Plain text-to-video training on clips, with still images mixed in: pretraining or full fine-tuning."""

import jax

from sdv_jax.objectives import denoising
from sdv_jax.objectives.denoising import Batch, Denoiser, Objective
from sdv_jax.typing import Array, Float, Key


def loss(
    model: Denoiser, clips: Batch, images: Batch | None, empty_text: Array, key: Key[Array, ""], *,
    objective: Objective, image_weight: float,
) -> Float[Array, ""]:  # fmt: skip
    """(1 - image_weight) · loss on the clips + image_weight · loss on the images, or the clips alone."""
    clip_key, image_key = jax.random.split(key)
    clip_loss = _plain(model, clips, empty_text, clip_key, objective)
    if images is None:
        return clip_loss
    return (1 - image_weight) * clip_loss + image_weight * _plain(model, images, empty_text, image_key, objective)


def _plain(
    model: Denoiser, batch: Batch, empty_text: Array, key: Key[Array, ""], objective: Objective
) -> Float[Array, ""]:
    latent_key, text_key, loss_key = jax.random.split(key, 3)
    latents = denoising.draw_latents(batch, latent_key, objective)
    text = denoising.draw_text(batch, empty_text, text_key, objective)
    return denoising.loss(model, latents, text, loss_key, objective=objective)
