"""The stochastic switch: which task a step trains, as a pure function of (run key, step), so that every host agrees."""

import enum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sdv_jax.typing import Array, Float, Int, Key

IDENTITY, MOTION = 0, 1


class Purpose(enum.IntEnum):
    """What a step draws random numbers for. Each draw has a key of its own, `step_key(run key, step, purpose)`."""

    TASK = 0
    VIEW_DROP = 1
    OBJECTIVE = 2
    LORA_DROPOUT = 3


def step_key(key: Key[Array, ""], step: int | Int[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """The key of one purpose in one step: two fold-ins of the run key."""
    return jax.random.fold_in(jax.random.fold_in(key, step), int(purpose))


def task_at(key: Key[Array, ""], step: int | Int[Array, ""], p: float | Float[Array, ""]) -> Int[Array, ""]:
    """MOTION (1) with probability p, else IDENTITY (0): u ~ U(0, 1), u < p (paper A)."""
    return (jax.random.uniform(step_key(key, step, Purpose.TASK)) < p).astype(jnp.int32)


def view_dropped_at(key: Key[Array, ""], step: int | Int[Array, ""], p: float | Float[Array, ""]) -> Int[Array, ""]:
    """1 with probability p: the reference is absent if this step trains identity."""
    return (jax.random.uniform(step_key(key, step, Purpose.VIEW_DROP)) < p).astype(jnp.int32)


def task_schedule(key: Key[Array, ""], steps: int, p: float) -> np.ndarray:
    """`task_at` of steps 0..steps-1 on the host: the loop picks a compiled program without waiting for the device."""
    return np.asarray(_over_steps(task_at, key, steps, p))


def view_drop_schedule(key: Key[Array, ""], steps: int, p: float) -> np.ndarray:
    """`view_dropped_at` of steps 0..steps-1 on the host, as booleans."""
    return np.asarray(_over_steps(view_dropped_at, key, steps, p)).astype(bool)


@partial(jax.jit, static_argnums=(0, 2))
def _over_steps(draw, key, steps, p):
    return jax.vmap(lambda step: draw(key, step, p))(jnp.arange(steps))
