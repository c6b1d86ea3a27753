"""Motion preservation: denoise a clip, given one of its own frames with some of its tokens dropped (paper A, 2)."""

import jax

from sdv_jax.adapters.reference import keep_index
from sdv_jax.objectives import denoising
from sdv_jax.objectives.denoising import Batch, Denoiser, Objective
from sdv_jax.typing import Array, Float, Key


def loss(
    model: Denoiser, batch: Batch, empty_text: Array, key: Key[Array, ""], *, objective: Objective, token_drop: float,
    references: int = 1, first_frame: bool = False, timesteps: Array | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """The loss on the clip.

    The reference frame is drawn uniformly over the clip's pixel frames, each encoded as a single image; `references`
    asks for several different ones, or with 0 for none: plain text-to-video. `first_frame` takes the first frame(s)
    instead. Of their N tokens round((1 - token_drop) · N) are kept per example, drawn without replacement, with their
    positions. `timesteps` [b] are drawn where they are not given.
    """
    latent_key, reference_key, token_key, text_key, loss_key = jax.random.split(key, 5)
    latents = denoising.draw_latents(batch, latent_key, objective)
    text = denoising.draw_text(batch, empty_text, text_key, objective)
    if references == 0:
        return denoising.loss(model, latents, text, loss_key, objective=objective, timesteps=timesteps)
    reference = denoising.draw_references(batch, reference_key, objective, references, first=first_frame)
    index = None
    if token_drop > 0:
        tokens = references * objective.geometry.frame_tokens(*latents.shape[2:4])
        index = keep_index(token_key, latents.shape[0], tokens, token_drop)
    return denoising.loss(
        model, latents, text, loss_key, objective=objective, reference=reference, reference_index=index,
        timesteps=timesteps,
    )  # fmt: skip
