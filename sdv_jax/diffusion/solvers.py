"""Solvers as init/step pairs: pure, jittable, with all coefficients computed beforehand on the host.

    state = solver.init(latents)
    state, latents = solver.step(state, prediction, latents, index, noise)        # index = 0 .. steps-1

A solver is a frozen dataclass of its config and step count: hashable, so it may be a static argument of `jax.jit`.
Arithmetic is float32; latents keep their dtype, being rounded to it after every step as diffusers' pipeline does.

diffusers finds the level a step goes *to* as `t - num_train_timesteps // steps`, not as the next timestep of the list;
the two differ when steps does not divide num_train_timesteps. We follow it, since results have to agree.
"""

import dataclasses
from functools import cached_property
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float, Int


class Levels(NamedTuple):
    """Signal levels (abar) of a trajectory, each [steps]: where a step starts, where it goes, if that ends it."""

    here: np.ndarray
    there: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Deterministic DDIM (diffusers `CogVideoXDDIMScheduler.step`, which takes an `eta` and ignores it: eta is 0)."""

    config: SchedulerConfig
    steps: int
    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        _ = self.coefficients  # an impossible configuration is reported here, not in the middle of a trace

    @cached_property
    def timesteps(self) -> np.ndarray:
        """int32 [steps], noisiest first."""
        return Schedule(self.config).timesteps(self.steps)

    @cached_property
    def coefficients(self) -> dict[str, np.ndarray]:
        """Float32 [steps] each: x_0 = x0_latents x + x0_prediction p;  next = keep x + denoised x_0."""
        levels = _levels(self.config, self.timesteps)
        keep = ((1 - levels.there) / (1 - levels.here)) ** 0.5
        return float32_tables(
            **_denoised(self.config, levels.here),
            keep=keep,
            denoised=levels.there**0.5 - levels.here**0.5 * keep,
        )

    def init(self, latents: Float[Array, "b ..."]) -> tuple[()]:
        """DDIM remembers nothing."""
        return ()

    def step(
        self,
        state: tuple[()],
        prediction: Float[Array, "b ..."],
        latents: Float[Array, "b ..."],
        index: int | Int[Array, ""],
        noise: Float[Array, "b ..."] | None = None,
    ) -> tuple[tuple[()], Float[Array, "b ..."]]:
        """One step from timesteps[index]; `noise` is not used. Returns (state, latents) with the latents' dtype."""
        c = at(self.coefficients, index)
        x = latents.astype(jnp.float32)
        x0 = c["x0_latents"] * x + c["x0_prediction"] * prediction.astype(jnp.float32)
        return state, (c["keep"] * x + c["denoised"] * x0).astype(latents.dtype)


@dataclasses.dataclass(frozen=True)
class DPM:
    """Stochastic DPM-Solver++ (2M SDE), as diffusers `CogVideoXDPMScheduler`.

    Second order, but for the first step and for a step that ends at a timestep below 0 (the last, as a rule).

    diffusers draws noise twice in every second-order step and uses the second draw; a first-order step draws once.
    `noise` is the draw that is used: the last draw of each step (`second_order` says which steps draw twice).
    """

    config: SchedulerConfig
    steps: int
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        _ = self.coefficients  # an impossible configuration is reported here, not in the middle of a trace

    @cached_property
    def timesteps(self) -> np.ndarray:
        """int32 [steps], noisiest first."""
        return Schedule(self.config).timesteps(self.steps)

    @cached_property
    def second_order(self) -> np.ndarray:
        """Bool [steps]: the steps that use the previous x_0 estimate (in diffusers: that draw noise twice)."""
        return (np.arange(self.steps) > 0) & ~_levels(self.config, self.timesteps).ends

    @cached_property
    def coefficients(self) -> dict[str, np.ndarray]:
        """Float32 [steps] each: x_0 = x0_latents x + x0_prediction p;
        next = keep x + denoised (now x_0 - before x_0_previous) + noise eps.
        """
        levels = _levels(self.config, self.timesteps)
        with np.errstate(divide="ignore", invalid="ignore"):  # log-SNR is infinite at both ends; the limits are finite
            half_log_snr = [np.log((kept / (1 - kept)) ** 0.5) for kept in (levels.here, levels.there)]
            h = half_log_snr[1] - half_log_snr[0]
            last_h = half_log_snr[0] - np.roll(half_log_snr[0], 1)
            before = np.where(self.second_order, 1 / (2 * (last_h / h)), 0)
            keep = ((1 - levels.there) / (1 - levels.here)) ** 0.5 * np.exp(-h)
        return float32_tables(
            **_denoised(self.config, levels.here),
            keep=keep,
            denoised=-np.expm1(-2 * h) * levels.there**0.5,
            now=1 + before,
            before=before,
            noise=(1 - levels.there) ** 0.5 * (1 - np.exp(-2 * h)) ** 0.5,
        )

    def init(self, latents: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """The previous x_0 estimate, float32; zeros before the first step, whose `before` coefficient is 0."""
        return jnp.zeros_like(latents, jnp.float32)

    def step(
        self,
        state: Float[Array, "b ..."],
        prediction: Float[Array, "b ..."],
        latents: Float[Array, "b ..."],
        index: int | Int[Array, ""],
        noise: Float[Array, "b ..."],
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """One step from timesteps[index] with standard normal `noise`. Returns (x_0 estimate, latents)."""
        c = at(self.coefficients, index)
        x = latents.astype(jnp.float32)
        x0 = c["x0_latents"] * x + c["x0_prediction"] * prediction.astype(jnp.float32)
        target = c["now"] * x0 - c["before"] * state
        x = c["keep"] * x + c["denoised"] * target + c["noise"] * noise.astype(jnp.float32)
        return x0, x.astype(latents.dtype)


def _levels(config: SchedulerConfig, timesteps: np.ndarray) -> Levels:
    schedule = Schedule(config)
    there = timesteps - config.num_train_timesteps // len(timesteps)
    kept, final = schedule.alphas_cumprod, schedule.final_alpha_cumprod
    return Levels(here=kept[timesteps], there=np.where(there >= 0, kept[there], kept.dtype.type(final)), ends=there < 0)


def _denoised(config: SchedulerConfig, kept: np.ndarray) -> dict[str, np.ndarray]:
    on_latents, on_prediction = Schedule(config).denoised_coefficients(kept)
    if not np.isfinite(on_latents).all():
        raise UserError(
            "scheduler: prediction_type epsilon cannot start from zero terminal SNR (x_0 is undetermined there);"
            " use v_prediction, or timestep_spacing leading, or rescale_betas_zero_snr false"
        )
    return {"x0_latents": on_latents, "x0_prediction": on_prediction}


def float32_tables(**tables: np.ndarray) -> dict[str, np.ndarray]:
    """Coefficients as the device gets them. Raises UserError where one is not finite."""
    for name, table in tables.items():
        if not np.isfinite(table).all():
            step = int(np.argwhere(~np.isfinite(table))[0, 0])
            raise UserError(f"scheduler: coefficient {name!r} is not finite at step {step}; check the betas")
    return {name: table.astype(np.float32) for name, table in tables.items()}


def at(tables: dict[str, np.ndarray], index: int | Array) -> dict[str, Array]:
    """The row of one step, whose index may be traced."""
    return {name: jnp.asarray(table)[index] for name, table in tables.items()}
