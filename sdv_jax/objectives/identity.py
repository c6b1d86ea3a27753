"""Identity injection: denoise a single image of a subject, given another one and a caption (paper A, task 1)."""

import jax

from sdv_jax.objectives import denoising
from sdv_jax.objectives.denoising import Batch, Denoiser, Objective
from sdv_jax.typing import Array, Float, Key


def loss(
    model: Denoiser, batch: Batch, empty_text: Array, key: Key[Array, ""], *, objective: Objective, view_dropped: bool,
    references: int = 1, timesteps: Array | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """The loss on the target image; with `view_dropped` the reference is absent and this is plain text-to-image.

    Paper A drops one reference view with probability 0.5 against pose overfitting. Our reading: the whole reference,
    for the whole step, which makes two programs of fixed shapes. `references` different views are given otherwise.
    `timesteps` [b] are drawn where they are not given.
    """
    latent_key, reference_key, text_key, loss_key = jax.random.split(key, 4)
    latents = denoising.draw_latents(batch, latent_key, objective)
    text = denoising.draw_text(batch, empty_text, text_key, objective)
    reference = None if view_dropped else denoising.draw_references(batch, reference_key, objective, references)
    return denoising.loss(model, latents, text, loss_key, objective=objective, reference=reference, timesteps=timesteps)
