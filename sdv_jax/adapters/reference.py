"""Which tokens of a reference image a training step keeps."""

import jax
import jax.numpy as jnp

from sdv_jax.typing import Array, Int, Key


def kept_count(tokens: int, drop: float) -> int:
    """round((1 - drop) · tokens): how many reference tokens a step keeps. The count is fixed, so shapes are."""
    return max(1, round((1 - drop) * tokens))


def keep_index(key: Key[Array, ""], batch: int, tokens: int, drop: float) -> Int[Array, "b r"]:
    """Which reference tokens each example keeps: drawn without replacement, in increasing order.

    Our reading of paper A's TokenDrop (p_drop = 0.5): dropped tokens leave the sequence, others keep their positions.
    """
    order = jnp.argsort(jax.random.uniform(key, (batch, tokens)), axis=1)
    return jnp.sort(order[:, :kept_count(tokens, drop)], axis=1)
