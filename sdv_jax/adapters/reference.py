"""Which references, and which of their tokens, a training step keeps."""

import jax
import jax.numpy as jnp

from sdv_jax.typing import Array, Int, Key


def kept_count(tokens: int, drop: float) -> int:
    """round((1 - drop) · tokens): how many reference tokens a step keeps. The count is fixed, so shapes are."""
    return max(1, round((1 - drop) * tokens))


def draw_distinct(key: Key[Array, ""], batch: int, size: int, count: int) -> Int[Array, "b r"]:
    """For each example `count` different ones of 0..size-1, uniformly, in drawn order."""
    return jnp.argsort(jax.random.uniform(key, (batch, size)), axis=1)[:, :count]


def keep_index(key: Key[Array, ""], batch: int, tokens: int, drop: float) -> Int[Array, "b r"]:
    """Which reference tokens each example keeps: drawn without replacement, in increasing order.

    Our reading of paper A's TokenDrop (p_drop = 0.5): dropped tokens leave the sequence, others keep their positions.
    """
    return jnp.sort(draw_distinct(key, batch, tokens, kept_count(tokens, drop)), axis=1)
