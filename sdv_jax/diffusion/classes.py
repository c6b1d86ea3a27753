"""What a `scheduler_config.json` names: its config, its noise schedule and its solver, by diffusers' class name."""

from collections.abc import Mapping

from sdv_jax.diffusion import flow, schedules
from sdv_jax.diffusion.flow import FlowSchedule, FlowSchedulerConfig
from sdv_jax.diffusion.flow_solvers import FlowMatchEuler, UniPC
from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.diffusion.solvers import DDIM, DPM
from sdv_jax.errors import UserError

AnySchedulerConfig = SchedulerConfig | FlowSchedulerConfig
AnySchedule = Schedule | FlowSchedule
Solver = DDIM | DPM | FlowMatchEuler | UniPC
SOLVERS = {
    "CogVideoXDDIMScheduler": DDIM,
    "CogVideoXDPMScheduler": DPM,
    flow.EULER: FlowMatchEuler,
    flow.UNIPC: UniPC,
}


def scheduler_config(entries: Mapping) -> AnySchedulerConfig:
    """The config of a parsed scheduler_config.json. Raises UserError on an unknown class, setting or value."""
    for kind, names in ((SchedulerConfig, schedules.CLASS_NAMES), (FlowSchedulerConfig, flow.CLASS_NAMES)):
        if entries.get("_class_name") in names:
            return kind.from_dict(entries)
    raise UserError(f"scheduler: unknown _class_name {entries.get('_class_name')!r}; known: {', '.join(SOLVERS)}")


def noise_schedule(config: AnySchedulerConfig) -> AnySchedule:
    """The noise schedule of a config, for training."""
    return FlowSchedule(config) if isinstance(config, FlowSchedulerConfig) else Schedule(config)


def make_solver(config: AnySchedulerConfig, steps: int) -> Solver:
    """The solver of the config's class with `steps` steps. Raises UserError when the two do not fit together."""
    return SOLVERS[config.class_name](config, steps)
