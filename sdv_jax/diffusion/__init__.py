"""Diffusion: noise schedules, solvers (init/step pairs), guidance, and the sampling loop."""

from sdv_jax.diffusion.guidance import classifier_free, conditional, dynamic_scale, uses_guidance
from sdv_jax.diffusion.sample import sample
from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.diffusion.solvers import DDIM, DPM, Solver, make_solver

__all__ = [
    "DDIM", "DPM", "Schedule", "SchedulerConfig", "Solver", "classifier_free", "conditional", "dynamic_scale",
    "make_solver", "sample", "uses_guidance",
]  # fmt: skip
