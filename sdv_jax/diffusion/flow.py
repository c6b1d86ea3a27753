"""Flow matching: data and noise mixed along a straight line, the network predicting the line's direction.

    x_s = (1 - s) x_0 + s eps        target: eps - x_0        s = t / num_train_timesteps, t in 0..num_train_timesteps

The noise level s is called sigma in the solvers. Sampling and training both spend more of their steps at high noise by
*shifting* levels: shift s / (1 + (shift - 1) s), the more so the larger the video.

Source: arXiv 2210.02747; the shift: arXiv 2403.03206, section 5.3.2; diffusers `FlowMatchEulerDiscreteScheduler` and
`UniPCMultistepScheduler` with `use_flow_sigmas`.
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float, Int

EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
CLASS_NAMES = (EULER, UNIPC)
_SHARED = (
    "num_train_timesteps", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal",
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
)  # fmt: skip
_SETTINGS = {
    EULER: (
        *_SHARED, "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "invert_sigmas",
        "stochastic_sampling",
    ),
    UNIPC: (
        *_SHARED, "beta_start", "beta_end", "beta_schedule", "trained_betas", "solver_order", "prediction_type",
        "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "predict_x0", "solver_type",
        "lower_order_final", "disable_corrector", "solver_p", "use_flow_sigmas", "timestep_spacing", "steps_offset",
        "final_sigmas_type", "rescale_betas_zero_snr", "sigma_min", "sigma_max",
    ),
}  # fmt: skip
_IN_FILE = {EULER: {"flow_shift": "shift"}, UNIPC: {}}  # our name -> the file's name, where they differ
_WHERE_ABSENT = {EULER: {}, UNIPC: {"prediction_type": "epsilon", "use_flow_sigmas": False}}  # diffusers' defaults
_ONLY = {  # settings with one implemented value
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True, "thresholding": False,
    "solver_p": None, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "invert_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip
_CHOICES = {
    "class_name": CLASS_NAMES,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "solver_type": ("bh1", "bh2"),
    "solver_order": (1, 2, 3),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
}
_INTEGERS = ("num_train_timesteps", "solver_order", "steps_offset", "base_image_seq_len", "max_image_seq_len")
_FLAGS = ("lower_order_final", "rescale_betas_zero_snr")
_NUMBERS = ("flow_shift", "beta_start", "beta_end", "dynamic_thresholding_ratio", "sample_max_value")
_OPTIONAL_NUMBERS = ("base_shift", "max_shift", "sigma_min", "sigma_max")


@dataclasses.dataclass(frozen=True)
class FlowSchedulerConfig:
    """One `scheduler_config.json` of a flow model: the settings of both diffusers classes under their names.

    `flow_shift` is called `shift` in the file of the Euler class. A setting that only the other class has keeps its
    value, changes nothing and is not written, so that `dataclasses.replace(config, class_name=...)` changes solvers.

    Kept so that a file survives a round trip, and without effect in diffusers too once `use_flow_sigmas` is set: the
    betas, `timestep_spacing`, `steps_offset`, `rescale_betas_zero_snr`; and what only refused settings would read.

    Raises UserError on a value outside the known choices or ranges, and on settings that are not implemented.
    """

    class_name: str = UNIPC
    num_train_timesteps: int = 1000
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    stochastic_sampling: bool = False

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    solver_order: int = 2
    prediction_type: str = "flow_prediction"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    use_flow_sigmas: bool = True
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"scheduler: unknown {name} {getattr(self, name)!r}; known: {', '.join(map(str, known))}"
                )
        for name, only in _ONLY.items():
            if type(getattr(self, name)) is not type(only) or getattr(self, name) != only:
                raise UserError(
                    f"scheduler: {name} {_json(getattr(self, name))} is not implemented, expected {_json(only)}"
                )
        self._check_kinds()
        if self.num_train_timesteps < 2:
            raise UserError(f"scheduler: num_train_timesteps must be at least 2, found {self.num_train_timesteps}")
        check_shift(self.flow_shift)

    def _check_kinds(self) -> None:
        for name in _INTEGERS:
            if type(getattr(self, name)) is not int:
                raise UserError(f"scheduler: {name} must be an integer, found {getattr(self, name)!r}")
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise UserError(f"scheduler: {name} must be true or false, found {getattr(self, name)!r}")
        for name in (*_NUMBERS, *_OPTIONAL_NUMBERS):
            value = getattr(self, name)
            if not _is_number(value) and not (value is None and name in _OPTIONAL_NUMBERS):
                raise UserError(f"scheduler: {name} must be a finite number, found {value!r}")
        steps = self.disable_corrector
        if not isinstance(steps, tuple) or not all(type(step) is int for step in steps):
            raise UserError(f"scheduler: disable_corrector must be a list of step numbers, found {_json(steps)}")
        betas = self.trained_betas
        if betas is not None and not (isinstance(betas, tuple) and all(map(_is_number, betas))):
            raise UserError("scheduler: trained_betas must be a list of numbers or null")

    @classmethod
    def from_dict(cls, entries: Mapping) -> "FlowSchedulerConfig":
        """From the parsed json. `_class_name` is required; other keys that start with "_" are notes of the writer.

        What the file leaves out has the default of its diffusers class, which for UniPC is not a flow: such a file is
        refused. Settings that only the other class has are left unread, as diffusers does: its `from_config` makes such
        files when it goes from one class to the other.

        Raises UserError on an unknown class, an unknown key, or a bad or unimplemented value.
        """
        class_name = entries.get("_class_name")
        if class_name not in CLASS_NAMES:
            raise UserError(f"scheduler: unknown class {class_name!r}; known flow classes: {', '.join(CLASS_NAMES)}")
        ours = {_IN_FILE[class_name].get(name, name): name for name in _SETTINGS[class_name]}
        others = {_IN_FILE[other].get(name, name) for other in CLASS_NAMES for name in _SETTINGS[other]} - set(ours)
        values = {key: value for key, value in entries.items() if not key.startswith("_") and key not in others}
        if unknown := sorted(set(values) - set(ours)):
            raise UserError(
                f"scheduler: {class_name} has no setting {', '.join(unknown)}; known: {', '.join(sorted(ours))}"
            )
        for name in ("disable_corrector", "trained_betas"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        settings = _WHERE_ABSENT[class_name] | {ours[key]: value for key, value in values.items()}
        return cls(class_name=class_name, **settings)

    def to_dict(self) -> dict:
        """The json form: the settings of its class under the file's names, and `_class_name`; undoes `from_dict`."""
        names = _IN_FILE[self.class_name]
        values = {names.get(name, name): getattr(self, name) for name in _SETTINGS[self.class_name]}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {"_class_name": self.class_name, **values}


def with_flow_shift(config: FlowSchedulerConfig, shift: float) -> FlowSchedulerConfig:
    """The config with another shift. Raises UserError where the scheduler has none, or on a bad number."""
    if not isinstance(config, FlowSchedulerConfig):
        raise UserError(f"flow_shift: {config.class_name} has no shift; flow schedulers: {', '.join(CLASS_NAMES)}")
    shift = float(shift) if isinstance(shift, numbers.Real) and not isinstance(shift, bool) else shift
    check_shift(shift)
    return dataclasses.replace(config, flow_shift=shift)


def shifted(levels: Float[Array, "..."] | np.ndarray, shift: float) -> Float[Array, "..."] | np.ndarray:
    """shift s / (1 + (shift - 1) s): keeps 0 and 1, moves what lies between towards 1 where shift > 1."""
    return shift * levels / (1 + (shift - 1) * levels)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """The straight line from data to noise. Hashed by its config, so it may be a static argument of `jax.jit`.

    All per-example functions take timesteps [b], integer or float, in 0..num_train_timesteps; they compute in float32
    and return the dtype of their first argument.
    """

    config: FlowSchedulerConfig

    def sigmas(self, steps: int) -> np.ndarray:
        """Noise levels of sampling, float32 [steps + 1]: where each step starts, and where the last one ends.

        Raises UserError if steps is not in 1..num_train_timesteps.
        """
        visited = self._visited(steps)
        keeps_noise = self.config.class_name == UNIPC and self.config.final_sigmas_type == "sigma_min"
        return np.append(visited, visited[-1] if keeps_noise else 0.0).astype(np.float32)

    def timesteps(self, steps: int) -> np.ndarray:
        """What the network is told in each step, [steps], noisiest first: float32 with Euler, int32 with UniPC.

        diffusers cuts off UniPC's fractions (the level 0.9999 becomes timestep 999); results have to agree, so we do.
        """
        total = self.config.num_train_timesteps
        if self.config.class_name == UNIPC:
            return (self._visited(steps) * total).astype(np.int32)
        return self.sigmas(steps)[:-1] * np.float32(total)

    def _visited(self, steps: int) -> np.ndarray:
        """Float64 [steps]: the levels at which steps start."""
        total, shift = self.config.num_train_timesteps, self.config.flow_shift
        if not 1 <= steps <= total:
            raise UserError(f"scheduler: steps must be in 1..{total} (num_train_timesteps), found {steps}")
        if self.config.class_name == EULER:
            # the ends of the range are shifted already, in float32, and all of it is shifted once more below
            low, high = (float(shifted(level, np.float32(shift))) for level in (np.float32(1) / total, np.float32(1)))
            return shifted(np.linspace(high * total, low * total, steps) / total, shift)
        visited = shifted(np.linspace(1, 1 / total, steps + 1)[:-1], shift)
        visited[0] = min(visited[0], 1 - 1e-6)  # log-SNR is infinite at 1
        return visited

    def add_noise(
        self, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Float[Array, " b"] | Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """x_s at the level of each timestep."""
        level = self._levels(timesteps, x0.ndim)
        return ((1 - level) * x0.astype(jnp.float32) + level * noise.astype(jnp.float32)).astype(x0.dtype)

    def target(
        self, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], timesteps: Float[Array, " b"] | Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """What the network is to predict: eps - x_0, the same at every timestep."""
        return (noise.astype(jnp.float32) - x0.astype(jnp.float32)).astype(x0.dtype)

    def predict_x0(
        self,
        prediction: Float[Array, "b ..."],
        x_t: Float[Array, "b ..."],
        timesteps: Float[Array, " b"] | Int[Array, " b"],
    ) -> Float[Array, "b ..."]:
        """The x_0 that a prediction stands for: x_s - s prediction."""
        level = self._levels(timesteps, x_t.ndim)
        return (x_t.astype(jnp.float32) - level * prediction.astype(jnp.float32)).astype(prediction.dtype)

    def _levels(self, timesteps: Array, ndim: int) -> Array:
        """s = t / num_train_timesteps, float32 [b, 1, ...] of `ndim` axes."""
        return timesteps.reshape(-1, *[1] * (ndim - 1)).astype(jnp.float32) / self.config.num_train_timesteps


def check_shift(shift: float) -> None:
    """Raises UserError on what is not a positive number."""
    if not _is_number(shift) or shift <= 0:
        raise UserError(f"scheduler: flow_shift must be a positive number, found {shift!r}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _json(value: object) -> str:
    """A value as the file has it, for messages."""
    return json.dumps(value, default=repr)
