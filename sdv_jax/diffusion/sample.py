"""The whole denoising loop as one `lax.scan`; or phases of it, where the network changes on the way.

`sample` is pure and holds no jit of its own: the caller jits one function that builds the denoise function from its
arguments (network state, conditions) and calls `sample`, and keeps it, so that equal shapes compile once:

    @partial(jax.jit, static_argnames=("solver", "progress"))
    def generate(state, conditions, negative, latents, scale, key, *, solver, progress):
        predict = lambda x, t, text: nnx.merge(graph, state)(x, text, t)
        return sample(classifier_free(predict, conditions, negative=negative), solver, latents, guidance=scale, key=key,
                      progress=progress)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdv_jax.diffusion.classes import Solver
from sdv_jax.diffusion.guidance import Denoise, per_step
from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float, Int, Key

Carry = tuple[Any, Array]  # (solver state, latents [b, ...])


class _Step(NamedTuple):
    """What one iteration of the scan reads; `noise` is None unless the user brought it."""

    index: Int[Array, ""]
    timestep: Int[Array, ""] | Float[Array, ""]
    scale: Float[Array, ""]
    noise: Float[Array, "b ..."] | None


def sample(
    denoise: Denoise,
    solver: Solver,
    latents: Float[Array, "b ..."],
    *,
    guidance: float | Float[np.ndarray, " steps"] | Float[Array, " steps"] | Float[Array, ""],
    key: Key[Array, ""] | None = None,
    step_noise: Float[Array, "steps b ..."] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Array, "b ..."]:
    """Takes standard normal `latents` through every timestep of `solver`; returns latents of that shape and dtype.

    Args:
      denoise: (latents, timesteps [b] with the solver's dtype, scale) -> prediction; see `guidance.classifier_free`,
        `.conditional`.
      guidance: one scale, or one per step (`guidance.dynamic_scale`, `.two_expert_scales`).
      key: a stochastic solver's step i draws its noise from fold_in(key, i), in float32.
      step_noise: that noise instead of drawing it, one array per step; `key` is then not read.
      progress: called on the host as progress(finished, steps) after each step; order and thread are not promised. It
        is part of the compiled program, so pass the same callable every time. None adds nothing to the program.

    A deterministic solver reads neither `key` nor `step_noise`.

    Raises UserError when a stochastic solver has no source of noise, or `step_noise` has the wrong shape.
    """
    _, latents = run(
        denoise, solver, (solver.init(latents), latents), begin=0, end=solver.steps, guidance=guidance, key=key,
        step_noise=step_noise, progress=progress,
    )  # fmt: skip
    return latents


def run(
    denoise: Denoise,
    solver: Solver,
    carry: Carry,
    *,
    begin: int,
    end: int,
    guidance: float | Float[np.ndarray, " steps"] | Float[Array, " steps"] | Float[Array, ""],
    key: Key[Array, ""] | None = None,
    step_noise: Float[Array, "steps b ..."] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Carry:
    """Steps begin..end-1 of the loop, for models whose network changes on the way (one expert's weights at a time):

        carry = solver.init(latents), latents
        carry = run(high_noise, solver, carry, begin=0, end=first_low, ...)
        _, latents = run(low_noise, solver, carry, begin=first_low, end=solver.steps, ...)

    equals `sample` with a network that switches at `first_low` (`guidance.two_expert_scales`), rounding apart: the
    carry brings all that a solver remembers over the boundary.

    Args:
      carry: (solver state, latents); (solver.init(latents), latents) before step 0. Returned in the same form.
      begin, end: 0 <= begin <= end <= solver.steps; equal ones return the carry as it is.
      The others as in `sample`, over all steps of the solver whatever the phase: `guidance` and `step_noise` have
        solver.steps entries, step i draws from fold_in(key, i), progress reports (i + 1, solver.steps).

    Raises UserError as `sample` does; ValueError on a phase outside the solver's steps.
    """
    steps, (_, latents) = solver.steps, carry
    batch = latents.shape[0]
    if not 0 <= begin <= end <= steps:
        raise ValueError(f"expected 0 <= begin <= end <= {steps}, found begin {begin} and end {end}")
    _check_noise(solver, latents.shape, key, step_noise)
    phase = slice(begin, end)
    noise = step_noise[phase] if solver.stochastic and step_noise is not None else None

    def body(carry: Carry, now: _Step) -> tuple[Carry, None]:
        state, x = carry
        prediction = denoise(x, jnp.full((batch,), now.timestep), now.scale)
        drawn = now.noise
        if solver.stochastic and drawn is None:
            drawn = jax.random.normal(jax.random.fold_in(key, now.index), x.shape, jnp.float32)
        state, x = solver.step(state, prediction, x, now.index, drawn)
        if progress is not None:
            # one element of the result ties the call to the end of the step: without it XLA may report before working
            jax.debug.callback(lambda i, _: progress(int(i) + 1, steps), now.index, x[(0,) * x.ndim])
        return (state, x), None

    xs = _Step(jnp.arange(begin, end), jnp.asarray(solver.timesteps[phase]), per_step(guidance, steps)[phase], noise)
    carry, _ = jax.lax.scan(body, carry, xs)
    return carry


def _check_noise(solver: Solver, shape: tuple[int, ...], key: Array | None, step_noise: Array | None) -> None:
    if not solver.stochastic:
        return
    if key is None and step_noise is None:
        name = type(solver).__name__
        raise UserError(f"{name} adds noise in every step: give a key, or step_noise of {solver.steps} arrays")
    expected = (solver.steps, *shape)
    if step_noise is not None and step_noise.shape != expected:
        raise UserError(f"step_noise: expected shape {expected} (steps, then latents), found {step_noise.shape}")
