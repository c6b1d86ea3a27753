"""Which noise levels training visits."""

import jax
import jax.numpy as jnp
import numpy as np

from sdv_jax.diffusion.flow import FlowSchedule, check_shift, shifted
from sdv_jax.diffusion.schedules import Schedule
from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float, Int, Key

LAWS = ("uniform", "logit_normal")


def draw_timesteps(
    key: Key[Array, ""],
    batch: int,
    *,
    schedule: Schedule | FlowSchedule,
    law: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float | None = None,
) -> Int[Array, " b"] | Float[Array, " b"]:
    """Training timesteps [batch] of either kind of schedule.

    A level s in (0, 1) is drawn by `law`: uniform, or sigmoid(N(logit_mean, logit_std)) (arXiv 2403.03206, section
    3.1). With T = num_train_timesteps,

    - a discrete schedule gets floor(T s), int32 in 0..T-1;
    - a flow gets T shifted(s), float32, with `shift`, or the scheduler file's flow_shift where that is None.

    Raises UserError on an unknown law, a shift that is not positive, or a shift for a discrete schedule.
    """
    if law not in LAWS:
        raise UserError(f"timesteps: unknown law {law!r}; known: {', '.join(LAWS)}")
    count = schedule.config.num_train_timesteps
    if isinstance(schedule, FlowSchedule):
        shift = schedule.config.flow_shift if shift is None else shift
        check_shift(shift)
        return count * shifted(_levels(key, batch, law, logit_mean, logit_std), shift)
    if shift is not None:
        raise UserError(f"timesteps: {schedule.config.class_name} has no shift, found {shift!r}; leave it out")
    if law == "uniform":
        return jax.random.randint(key, (batch,), 0, count)
    levels = _levels(key, batch, law, logit_mean, logit_std)
    return jnp.minimum(jnp.floor(count * levels).astype(jnp.int32), count - 1)


def bin_middles(bins: int, *, schedule: Schedule | FlowSchedule) -> np.ndarray:
    """Timesteps [bins] in the middles of equal bins of 0..T: whole numbers where the schedule is discrete."""
    middles = schedule.config.num_train_timesteps * (np.arange(bins) + 0.5) / bins
    return middles.astype(np.float32 if isinstance(schedule, FlowSchedule) else np.int32)


def _levels(key: Array, batch: int, law: str, mean: float, std: float) -> Array:
    if law == "uniform":
        return jax.random.uniform(key, (batch,), jnp.float32, minval=2**-24)
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,), jnp.float32))
