"""Guidance wraps a network into the denoise function that `sample` calls.

    predict(latents [b, ...], timesteps [b], conditions) -> prediction [b, ...]     conditions: pytree, leading axis b
    denoise(latents [b, ...], timesteps [b], scale)      -> prediction [b, ...]     float32

Timesteps are those of the solver: int32, or float32 with FlowMatchEuler.

diffusers guides when the scale is above 1 (`uses_guidance`); at or below it the network runs once, on the conditions.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float

Predict = Callable[[Array, Array, Any], Array]
Denoise = Callable[[Array, Array, Array], Array]


def uses_guidance(scale: float) -> bool:
    """Whether a scale asks for the second, unconditional half of the batch (diffusers: scale > 1)."""
    return scale > 1.0


def conditional(predict: Predict, conditions: Any) -> Denoise:
    """No guidance: one evaluation per step on `conditions`; the scale is not used."""

    def denoise(latents: Array, timesteps: Array, scale: Array) -> Array:
        return predict(latents, timesteps, conditions).astype(jnp.float32)

    return denoise


def classifier_free(predict: Predict, conditions: Any, *, negative: Any) -> Denoise:
    """Classifier-free guidance as one doubled batch, the negative half first as in diffusers.

        negative_prediction + scale (prediction - negative_prediction), in float32

    Args: `conditions` and `negative` have the same tree and shapes, each leaf with leading axis b. What guidance leaves
    alone (a subject reference) is simply the same in both.
    """
    both = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), negative, conditions)

    def denoise(latents: Array, timesteps: Array, scale: Array) -> Array:
        doubled = predict(jnp.concatenate([latents, latents]), jnp.concatenate([timesteps, timesteps]), both)
        without, with_conditions = jnp.split(doubled.astype(jnp.float32), 2)
        return without + scale * (with_conditions - without)

    return denoise


def dynamic_scale(scale: float, timesteps: np.ndarray) -> Float[np.ndarray, " steps"]:
    """CogVideoX's cosine guidance: the scale of each step, float32 [steps], for `sample(guidance=...)`.

        1 + scale (1 - cos(pi ((steps - t) / steps)^5)) / 2

    t is the timestep *value* (0..999), exactly as diffusers has it (`use_dynamic_cfg`): the base is then far outside
    0..1 and the scale of most steps jumps about between 1 and 1 + scale instead of rising. Computed on the host in
    float64, since the cosine's argument reaches 1e7 and more.
    """
    steps = len(timesteps)
    angles = [math.pi * ((steps - int(t)) / steps) ** 5.0 for t in timesteps]
    return np.asarray([1 + scale * ((1 - math.cos(angle)) / 2) for angle in angles], np.float32)


def two_expert_scales(
    high: float, low: float, timesteps: np.ndarray, boundary: float
) -> tuple[Float[np.ndarray, " steps"], int]:
    """The scale of each step for a model of two experts, and the index of the low-noise expert's first step.

    The high-noise expert, with its scale `high`, has the steps with timestep >= boundary; the other has the rest.

    Args: `timesteps` [steps] of a solver, noisiest first; `boundary` in the same unit (diffusers: boundary_ratio x
    num_train_timesteps). The index is 0 or len(timesteps) where one expert has every step.
    """
    noisy = np.asarray(timesteps) >= boundary
    return np.where(noisy, high, low).astype(np.float32), int(noisy.sum())


def per_step(guidance: float | np.ndarray | Array, steps: int) -> Float[Array, " steps"]:
    """A scale for every step from one number or from [steps] numbers. Raises UserError on another length."""
    guidance = jnp.asarray(guidance, jnp.float32)
    if guidance.shape not in ((), (steps,)):
        raise UserError(f"guidance: expected one scale or {steps} (one per step), found shape {guidance.shape}")
    return jnp.broadcast_to(guidance, (steps,))
