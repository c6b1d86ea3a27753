"""Noise schedules: how much signal each training timestep keeps, and the quantities training derives from it.

A schedule is read from a checkpoint's `scheduler_config.json` and computed once on the host, in the precision
diffusers uses (float64 for `scaled_linear`, else float32), so that sampling coefficients agree to rounding.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

Source: diffusers `CogVideoXDDIMScheduler` / `CogVideoXDPMScheduler`; zero terminal SNR: arXiv 2305.08891, Algorithm 1.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float, Int

CLASS_NAMES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
_CHOICES = {
    "class_name": CLASS_NAMES,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """One `scheduler_config.json`: field names and defaults are those of the diffusers classes.

    `clip_sample`, `clip_sample_range` and `sample_max_value` are kept so that a file survives a round trip; the
    CogVideoX schedulers of diffusers accept them and apply none of them, and neither do our solvers.

    Raises UserError on a value outside the known choices or ranges.
    """

    class_name: str = "CogVideoXDDIMScheduler"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"scheduler: unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("num_train_timesteps", "steps_offset"):
            if type(getattr(self, name)) is not int:
                raise UserError(f"scheduler: {name} must be an integer, found {getattr(self, name)!r}")
        for name in ("beta_start", "beta_end", "snr_shift_scale"):
            if type(getattr(self, name)) not in (int, float) or not math.isfinite(getattr(self, name)):
                raise UserError(f"scheduler: {name} must be a finite number, found {getattr(self, name)!r}")
        for name in ("clip_sample", "set_alpha_to_one", "rescale_betas_zero_snr"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"scheduler: {name} must be true or false, found {getattr(self, name)!r}")
        if self.num_train_timesteps < 2:
            raise UserError(f"scheduler: num_train_timesteps must be at least 2, found {self.num_train_timesteps}")
        if self.trained_betas is None and not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"scheduler: expected 0 < beta_start <= beta_end < 1, found {self.beta_start} and {self.beta_end}"
            )
        if self.snr_shift_scale <= 0:
            raise UserError(f"scheduler: snr_shift_scale must be positive, found {self.snr_shift_scale}")
        if self.trained_betas is not None:
            _check_trained_betas(self.trained_betas, self.num_train_timesteps)

    @classmethod
    def from_dict(cls, entries: Mapping) -> "SchedulerConfig":
        """From the parsed json. `_class_name` is required; other keys that start with "_" are notes of the writer.

        Raises UserError on an unknown class (the known ones are listed), an unknown key or a bad value.
        """
        if "_class_name" not in entries:
            raise UserError(f"scheduler: scheduler_config.json has no _class_name; known: {', '.join(CLASS_NAMES)}")
        known = {field.name for field in dataclasses.fields(cls)} - {"class_name"}
        values = {key: value for key, value in entries.items() if not key.startswith("_")}
        if entries["_class_name"] not in CLASS_NAMES:  # first: another class's keys would only blur the message
            raise UserError(f"scheduler: unknown class {entries['_class_name']!r}; known: {', '.join(CLASS_NAMES)}")
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"scheduler: {entries['_class_name']} has no setting {', '.join(unknown)};"
                f" known: {', '.join(sorted(known))}"
            )
        if isinstance(values.get("trained_betas"), list):
            values["trained_betas"] = tuple(values["trained_betas"])
        return cls(class_name=entries["_class_name"], **values)

    def to_dict(self) -> dict:
        """The json form: every setting under diffusers' name, the class under `_class_name`; inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        values["_class_name"] = values.pop("class_name")
        if self.trained_betas is not None:
            values["trained_betas"] = list(self.trained_betas)
        return values


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The noise law of one config. Equal and hashed by its config, so it may be a static argument of `jax.jit`.

    All per-example functions take timesteps [b] in 0..num_train_timesteps-1, compute in float32 and return the dtype of
    their first argument. Out-of-range timesteps are clamped by JAX's indexing, not reported.
    """

    config: SchedulerConfig

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar [num_train_timesteps]: float64 for `scaled_linear`, else float32, as diffusers holds it."""
        alphas = 1 - _betas(self.config)
        # torch accumulates a float32 product in float64 and rounds each entry
        kept = np.cumprod(alphas.astype(np.float64)).astype(alphas.dtype)
        shift = self.config.snr_shift_scale
        kept = kept / (shift + (1 - shift) * kept)
        return _zero_terminal_snr(kept) if self.config.rescale_betas_zero_snr else kept

    @property
    def final_alpha_cumprod(self) -> float:
        """abar after the last step: 1 (`set_alpha_to_one`) or the value at timestep 0."""
        return 1.0 if self.config.set_alpha_to_one else self.alphas_cumprod[0]

    def timesteps(self, steps: int) -> np.ndarray:
        """The int32 timesteps [steps] that sampling visits, noisiest first.

        Equal to diffusers' except where its `trailing` formula overshoots through float rounding (61, 103, 121, … of
        1000 steps): it then appends timestep -1, which wraps round to the noisiest level and ruins the result; we stop
        before it.

        Raises UserError if steps is not in 1..num_train_timesteps, or if steps_offset pushes a timestep out of range.
        """
        total, offset = self.config.num_train_timesteps, self.config.steps_offset
        if not 1 <= steps <= total:
            raise UserError(f"scheduler: steps must be in 1..{total} (num_train_timesteps), found {steps}")
        if self.config.timestep_spacing == "linspace":
            visited = np.linspace(0, total - 1, steps).round()[::-1]
        elif self.config.timestep_spacing == "leading":
            visited = np.arange(steps)[::-1] * (total // steps) + offset
        else:
            visited = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
        if visited.min() < 0 or visited.max() >= total:
            raise UserError(
                f"scheduler: steps_offset {offset} takes timesteps out of 0..{total - 1} at {steps} steps;"
                " use a smaller offset"
            )
        return visited.astype(np.int32)

    def denoised_coefficients(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(on x_t, on the prediction) such that their weighted sum is x_0, at signal levels `kept` = abar.

        Infinite for epsilon prediction at abar = 0: pure noise does not determine x_0.
        """
        signal, noise = kept**0.5, (1 - kept) ** 0.5
        if self.config.prediction_type == "v_prediction":
            return signal, -noise
        if self.config.prediction_type == "sample":
            return np.zeros_like(signal), np.ones_like(signal)
        with np.errstate(divide="ignore"):
            return 1 / signal, -noise / signal

    def add_noise(
        self, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """x_t of the forward process (diffusers `add_noise`)."""
        return _mix(self.alphas_cumprod**0.5, (1 - self.alphas_cumprod) ** 0.5, x0, noise, timesteps)

    def velocity(
        self, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """v_t, the target of v-prediction (diffusers `get_velocity`)."""
        return _mix(-((1 - self.alphas_cumprod) ** 0.5), self.alphas_cumprod**0.5, x0, noise, timesteps)

    def target(
        self, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """What the network is to predict, as every schedule calls it: here v_t.

        Raises UserError under another prediction type: only v is trained.
        """
        if self.config.prediction_type != "v_prediction":
            raise UserError(
                f"scheduler: prediction_type {self.config.prediction_type} cannot be trained, expected v_prediction"
            )
        return self.velocity(x0, noise, timesteps)

    def predict_x0(
        self, prediction: Float[Array, "b ..."], x_t: Float[Array, "b ..."], timesteps: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """The x_0 that a prediction of the config's `prediction_type` stands for."""
        on_latents, on_prediction = self.denoised_coefficients(self.alphas_cumprod)
        return _mix(on_prediction, on_latents, prediction, x_t, timesteps)

    def snr(self, timesteps: Int[Array, " b"]) -> Float[Array, " b"]:
        """abar / (1 - abar), float32; 0 at the last timestep of a zero-terminal-SNR schedule."""
        return jnp.asarray((self.alphas_cumprod / (1 - self.alphas_cumprod)).astype(np.float32))[timesteps]

    def loss_weight(self, timesteps: Int[Array, " b"]) -> Float[Array, " b"]:
        """w = 1 / (1 - abar), float32: the weight CogVideoX puts on the squared error of x_0 (papers: A3).

        Under v-prediction x_0_hat - x_0 = -sqrt(1 - abar) (v_hat - v), hence

            mean(w (x_0_hat - x_0)^2) = mean((v_hat - v)^2)

        and the plain error on v is the same loss without the detour. Finite at every timestep: at zero terminal SNR
        w = 1 (abar = 0), and the largest weight belongs to timestep 0, where 1 - abar >= beta_start > 0.
        """
        return jnp.asarray((1 / (1 - self.alphas_cumprod)).astype(np.float32))[timesteps]


def _check_trained_betas(betas: tuple[float, ...], total: int) -> None:
    if not isinstance(betas, tuple) or not all(type(beta) in (int, float) for beta in betas):
        raise UserError("scheduler: trained_betas must be a list of numbers or null")
    if len(betas) != total:
        raise UserError(f"scheduler: trained_betas has {len(betas)} entries, expected num_train_timesteps = {total}")
    if not all(0 < beta < 1 for beta in betas):
        raise UserError("scheduler: trained_betas must all lie strictly between 0 and 1")


def _betas(config: SchedulerConfig) -> np.ndarray:
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.asarray(config.trained_betas, np.float32)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, total).astype(np.float32)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, total) ** 2
    edges = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - edges[1:] / edges[:-1], 0.999).astype(np.float32)


def _zero_terminal_snr(kept: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) so that the last entry is exactly 0 and the first unchanged."""
    signal = np.sqrt(kept)
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))) ** 2


def _mix(first_weight: np.ndarray, second_weight: np.ndarray, first: Array, second: Array, timesteps: Array) -> Array:
    """first_weight[t] first + second_weight[t] second in float32, cast to first's dtype; weights are host tables."""
    column = timesteps.reshape(-1, *[1] * (first.ndim - 1))
    first_weight, second_weight = (jnp.asarray(w.astype(np.float32))[column] for w in (first_weight, second_weight))
    mixed = first_weight * first.astype(jnp.float32) + second_weight * second.astype(jnp.float32)
    return mixed.astype(first.dtype)
