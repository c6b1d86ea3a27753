"""Reference images on their way into the model: latents, and the tokens of them that a training step keeps."""

import jax
import jax.numpy as jnp

from sdv_jax.typing import Array, Float, Int, Key


def sample_latents(mean: Float[Array, "*b c"], logvar: Float[Array, "*b c"], scaling_factor: float,
                   key: Key[Array, ""]) -> Float[Array, "*b c"]:
    """A draw from the VAE's posterior, in the transformer's scale."""
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    return (mean + jnp.exp(0.5 * logvar) * noise) * scaling_factor


def kept_count(tokens: int, drop: float) -> int:
    """round((1 - drop) · tokens): how many reference tokens a step keeps. The count is fixed, so shapes are."""
    return max(1, round((1 - drop) * tokens))


def keep_index(key: Key[Array, ""], batch: int, tokens: int, drop: float) -> Int[Array, "b r"]:
    """Which reference tokens each example keeps: drawn without replacement, in increasing order.

    Our reading of paper A's TokenDrop (p_drop = 0.5): dropped tokens leave the sequence, others keep their positions.
    """
    order = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    return jnp.sort(order[:, :kept_count(tokens, drop)], axis=1)
