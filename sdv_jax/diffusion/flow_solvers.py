"""Solvers of flow models as init/step pairs; see `solvers` for the interface. Both are deterministic.

Coefficients are computed in float64 from the float32 noise levels that diffusers holds, and used in float32.
"""

import dataclasses
import math
from functools import cached_property
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from sdv_jax.diffusion.flow import FlowSchedule, FlowSchedulerConfig
from sdv_jax.diffusion.solvers import at, float32_tables
from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class FlowMatchEuler:
    """One straight line per step (diffusers `FlowMatchEulerDiscreteScheduler.step`)."""

    config: FlowSchedulerConfig
    steps: int
    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        _ = self.coefficients  # an impossible configuration is reported here, not in the middle of a trace

    @cached_property
    def timesteps(self) -> np.ndarray:
        """Float32 [steps], noisiest first."""
        return FlowSchedule(self.config).timesteps(self.steps)

    @cached_property
    def coefficients(self) -> dict[str, np.ndarray]:
        """Float32 [steps]: next = x + change p."""
        return float32_tables(change=np.diff(FlowSchedule(self.config).sigmas(self.steps).astype(np.float64)))

    def init(self, latents: Float[Array, "b ..."]) -> tuple[()]:
        """Euler remembers nothing."""
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
        change = at(self.coefficients, index)["change"]
        x = latents.astype(jnp.float32) + change * prediction.astype(jnp.float32)
        return state, x.astype(latents.dtype)


class Memory(NamedTuple):
    """What UniPC remembers, float32: the (corrected) latents the last step started from, and the last estimates of x_0,
    newest first, one per order of the solver."""

    start: Float[Array, "b ..."]
    estimates: tuple[Float[Array, "b ..."], ...]


@dataclasses.dataclass(frozen=True)
class UniPC:
    """Predictor-corrector of order 1 to 3 on x_0 (arXiv 2302.04867), as diffusers `UniPCMultistepScheduler`.

    Every step first corrects its latents, redoing the last step with the new estimate of x_0 as one more node, and
    then predicts the next ones. Both are weighted sums of what is remembered, so that order, warm-up and switched-off
    correctors are zeros in tables and the step has no branches.

    Where diffusers' last step divides by zero the limit is taken: `bh1` ends at the estimate of x_0 (there: NaN).
    """

    config: FlowSchedulerConfig
    steps: int
    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        _ = self.coefficients  # an impossible configuration is reported here, not in the middle of a trace

    @cached_property
    def timesteps(self) -> np.ndarray:
        """int32 [steps], noisiest first."""
        return FlowSchedule(self.config).timesteps(self.steps)

    @cached_property
    def orders(self) -> np.ndarray:
        """The order of each step's predictor, and of the corrector that follows it, [steps]."""
        done = np.arange(self.steps)
        orders = np.minimum(self.config.solver_order, done + 1)
        return np.minimum(orders, self.steps - done) if self.config.lower_order_final else orders

    @cached_property
    def corrects(self) -> np.ndarray:
        """Bool [steps]: the steps that first correct their latents."""
        done = np.arange(self.steps)
        return (done > 0) & ~np.isin(done - 1, self.config.disable_corrector)

    @cached_property
    def coefficients(self) -> dict[str, np.ndarray]:
        """Float32 tables, with m the estimates of x_0 remembered from before this step, newest first:

            m_now = x - sigma p
            x     = own x + before start + newest m_now + sum_k older[k] m[k]          corrector
            next  = keep x + sum_k ahead[k] (m_now, m...)[k]                           predictor

        `older` and `ahead` are [steps, order], the others [steps].
        """
        config, order = self.config, self.config.solver_order
        sigmas = FlowSchedule(config).sigmas(self.steps).astype(np.float64)
        if sigmas[-1] == 0 and self.orders[-1] > 1:
            raise UserError(
                "scheduler: lower_order_final false divides by zero in the last step where final_sigmas_type is zero;"
                " set lower_order_final to true, or final_sigmas_type to sigma_min"
            )
        own, before, newest, keep = np.ones(self.steps), *np.zeros((3, self.steps))
        older, ahead = np.zeros((2, self.steps, order))
        for i in range(self.steps):
            if self.corrects[i]:
                own[i] = 0
                before[i], newest[i], older[i] = _update(sigmas, i - 1, self.orders[i - 1], config, corrects=True)
            keep[i], _, ahead[i] = _update(sigmas, i, self.orders[i], config, corrects=False)
        return float32_tables(
            sigma=sigmas[:-1], own=own, before=before, newest=newest, older=older, keep=keep, ahead=ahead
        )

    def init(self, latents: Float[Array, "b ..."]) -> Memory:
        """Zeros, which the first steps' tables do not read."""
        nothing = jnp.zeros_like(latents, jnp.float32)
        return Memory(nothing, (nothing,) * self.config.solver_order)

    def step(
        self,
        state: Memory,
        prediction: Float[Array, "b ..."],
        latents: Float[Array, "b ..."],
        index: int | Int[Array, ""],
        noise: Float[Array, "b ..."] | None = None,
    ) -> tuple[Memory, Float[Array, "b ..."]]:
        """One step from timesteps[index]; `noise` is not used. Returns (memory, latents) with the latents' dtype."""
        c = at(self.coefficients, index)
        x = latents.astype(jnp.float32)
        x0 = x - c["sigma"] * prediction.astype(jnp.float32)
        x = c["own"] * x + c["before"] * state.start + c["newest"] * x0 + _weighted(c["older"], state.estimates)
        estimates = (x0, *state.estimates[:-1])
        return Memory(x, estimates), (c["keep"] * x + _weighted(c["ahead"], estimates)).astype(latents.dtype)


def _weighted(weights: Float[Array, " k"], arrays: tuple[Array, ...]) -> Array:
    return sum(weights[k] * array for k, array in enumerate(arrays))


def _update(
    sigmas: np.ndarray, start: int, order: int, config: FlowSchedulerConfig, *, corrects: bool
) -> tuple[float, float, np.ndarray]:
    """Weights of the step from sigmas[start] to the next level: (x, the estimate there, [order] estimates up to start).

    With h the step in half log-SNR and r_k = (distance of node k) / h,

        x_next = sigma'/sigma x - alpha' expm1(-h) m_0 - alpha' B(h) sum_k rho_k (m_k - m_0) / r_k

    where rho solves sum_k rho_k r_k^(i-1) = i! phi_{i+1}(-h) (-h) / B(h), i = 1..nodes; a single node takes 1/2. The
    predictor's nodes are the earlier estimates; the corrector has the estimate at the step's end, r = 1, as well.
    """
    weights = np.zeros(config.solver_order)
    end = start + 1
    if sigmas[end] == sigmas[start]:  # `sigma_min`: the last step goes nowhere
        return 1.0, 0.0, weights
    with np.errstate(divide="ignore"):
        log_snr = np.log1p(-sigmas) - np.log(sigmas)
    h, alpha = log_snr[end] - log_snr[start], 1 - sigmas[end]
    nodes = [(log_snr[start - k] - log_snr[start]) / h for k in range(1, order)] + [1.0] * corrects
    scale = -h if config.solver_type == "bh1" else math.expm1(-h)
    pulls = [-alpha * scale * rho / node for rho, node in zip(_rhos(nodes, h, scale), nodes, strict=True)]
    weights[0] = -alpha * math.expm1(-h) - sum(pulls)
    weights[1:order] = pulls[: order - 1]
    return sigmas[end] / sigmas[start], pulls[-1] if corrects else 0.0, weights


def _rhos(nodes: list[float], h: float, scale: float) -> np.ndarray:
    if len(nodes) < 2:
        return np.full(len(nodes), 0.5)
    phi, right = math.expm1(-h) / -h - 1, []
    for i in range(1, len(nodes) + 1):
        right.append(phi * math.factorial(i) / scale)
        phi = phi / -h - 1 / math.factorial(i + 1)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, right)
