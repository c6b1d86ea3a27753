"""Diffusion and flow matching: noise schedules, solvers (init/step pairs), guidance, and the sampling loop."""

from sdv_jax.diffusion.classes import (
    AnySchedule,
    AnySchedulerConfig,
    Solver,
    make_solver,
    noise_schedule,
    scheduler_config,
)
from sdv_jax.diffusion.flow import FlowSchedule, FlowSchedulerConfig, shifted, with_flow_shift
from sdv_jax.diffusion.flow_solvers import FlowMatchEuler, UniPC
from sdv_jax.diffusion.guidance import classifier_free, conditional, dynamic_scale, two_expert_scales, uses_guidance
from sdv_jax.diffusion.sample import run, sample
from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.diffusion.solvers import DDIM, DPM
from sdv_jax.diffusion.timesteps import bin_middles, draw_timesteps

__all__ = [
    "AnySchedule", "AnySchedulerConfig", "DDIM", "DPM", "FlowMatchEuler", "FlowSchedule", "FlowSchedulerConfig",
    "Schedule", "SchedulerConfig", "Solver", "UniPC", "bin_middles", "classifier_free", "conditional", "draw_timesteps",
    "dynamic_scale", "make_solver", "noise_schedule", "run", "sample", "scheduler_config", "shifted",
    "two_expert_scales", "uses_guidance", "with_flow_shift",
]  # fmt: skip
