"""From token ids to what a transformer reads, as its family treats padding."""

import jax.numpy as jnp
from flax import nnx

from sdv_jax.typing import Array, Float, Int

PAD = 0  # of every T5 tokenizer


def encode(encoder: nnx.Module, ids: Int[Array, "b s"], *, masked: bool) -> Float[Array, "b s d"]:
    """Embeddings of padded token ids.

    `masked` (Wan): padding is hidden from the encoder and zero in the result. Otherwise (CogVideoX) it is attended to
    like words.
    """
    if not masked:
        return encoder(ids)
    mask = ids != PAD
    return jnp.where(mask[..., None], encoder(ids, mask), 0)
