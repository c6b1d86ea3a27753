"""What a run looks at every so many steps: losses on held-out rows, the tasks' gradients, samples.

Records go to `validation.jsonl` and `gradients.jsonl` in the workdir, one line each, from step 0 on. A resumed run cuts
them back to its checkpoint first: the record of that very state may be there already, or not yet.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from sdv_jax.diffusion import bin_middles
from sdv_jax.objectives.denoising import Objective
from sdv_jax.train import gradients, plan, validation
from sdv_jax.train.config import Config
from sdv_jax.train.devices import Devices
from sdv_jax.train.heldout import HeldOut
from sdv_jax.train.logging import truncate
from sdv_jax.train.processes import is_writer
from sdv_jax.train.state import TrainState, Tree, result
from sdv_jax.typing import Array

VALIDATION, GRADIENTS = "validation.jsonl", "gradients.jsonl"
_CURVES = ("cosine", "norm_identity", "norm_motion")  # of a record of gradients
_NOISE = 0x5EED  # the key of all held-out noise, whatever the run's seed


class Monitor(NamedTuple):
    """Called with (state, steps done) after every `every` steps; returns what boards show: numbers and pictures."""

    every: int
    call: Callable[[TrainState, int], Mapping[str, float | Path]]


class _File:
    """The records of one file, of which those of later steps than `kept` will be made again."""

    def __init__(self, path: Path, kept: int, devices: Devices):
        self.path, self.newest = path, truncate(path, kept + 1) if is_writer() else None
        self.step = devices.from_writer(self.newest["step"] if self.newest else -1)

    def record(self, steps: int, measure: Callable[[], Mapping[str, object]]) -> Mapping[str, object]:
        """The record of the state after `steps` steps: measured and written, unless it is there, which only the process
        that writes can read.
        """
        if steps == self.step:
            return self.newest or {}
        record = {"step": steps} | measure()
        if is_writer():
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


def records(
    config: Config, held: HeldOut, graph: nnx.GraphDef, frozen: Tree, objective: Objective, empty_text: Array, *,
    devices: Devices, workdir: Path, kept: int,
) -> list[Monitor]:  # fmt: skip
    """The monitors that write records. Those that are there are true up to step `kept`, that of a checkpoint."""
    files = {name: _File(workdir / name, kept, devices) for name in (VALIDATION, GRADIENTS)}
    key, found = devices.replicate(jax.random.key(_NOISE)), []

    def batches(name: str):
        return held.batches(name, devices)

    if config.validation.every:
        measure = _validation(config, graph, objective)

        def losses(state: TrainState) -> dict[str, dict]:
            told = {}
            for task, (name, run) in measure.items():
                bins = run(result(state), frozen, batches(name), empty_text, key)
                told[task] = {"loss": sum(bins) / len(bins), "bins": bins}
            return told

        def validate(state: TrainState, steps: int) -> dict[str, float]:
            told, curves = files[VALIDATION].record(steps, lambda: losses(state)), {}
            for task in measure.keys() & told.keys():
                curves[f"validation/{task}"] = told[task]["loss"]
                curves |= {f"validation/{task}/bin_{i}": loss for i, loss in enumerate(told[task]["bins"])}
            return curves

        found.append(Monitor(config.validation.every, validate))
    if config.gradients.every:
        compare = gradients.make(graph, plan.losses(config, objective))

        def against(state: TrainState, steps: int) -> dict[str, float]:
            by_task = {task: batches(task) for task in gradients.TASKS}
            told = files[GRADIENTS].record(steps, lambda: compare(state.trained, frozen, by_task, empty_text, key))
            return {f"gradients/{name}": told[name] for name in _CURVES if name in told}

        found.append(Monitor(config.gradients.every, against))
    return found


def _validation(config: Config, graph: nnx.GraphDef, objective: Objective) -> dict[str, tuple[str, Callable]]:
    """Program -> (dataset, the function that measures it)."""
    timesteps = bin_middles(config.validation.bins, schedule=objective.schedule)
    losses, sizes = plan.losses(config, objective.without_dropout()), plan.part_sizes(config)
    return {
        program: (name, validation.make(graph, losses[program], timesteps=timesteps, rows=sizes[name]))
        for program, name in plan.measured_on(config).items()
    }
