"""Which program each step of a run executes and which batches it reads, decided on the host by (config, run key)."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

from sdv_jax.data.latents import LatentDataset, StepBatches, Stream
from sdv_jax.errors import UserError
from sdv_jax.objectives import identity, motion, switching, text_to_video
from sdv_jax.objectives.denoising import Objective
from sdv_jax.train.config import Config
from sdv_jax.typing import Array, Key

STREAMS = ("identity", "motion")  # the place in this tuple is part of a stream's shuffling seed


@dataclasses.dataclass(frozen=True)
class Plan:
    """`programs[i]` names the program of step i, a key of `losses`; `batches[i]` is its data."""

    programs: tuple[str, ...]
    losses: Mapping[str, Callable]
    batches: StepBatches

    def task(self, step: int) -> dict[str, object]:
        """The task as logged; identity says whether the reference was there."""
        task, _, variant = self.programs[step].partition("/")
        return {"task": task} | ({"reference": not variant} if task == "identity" else {})

    def position(self, step: int) -> dict[str, int]:
        """Batches read of each stream before `step`."""
        return {name: sum(name in reads for reads in self.batches.plan[:step]) for name in self.batches.streams}


def make(config: Config, datasets: Mapping[str, LatentDataset], objective: Objective, key: Key[Array, ""]) -> Plan:
    """The plan of `config.train.steps` steps. `datasets` has "identity", "motion" or both, as `needed` says."""
    missing = [name for name in needed(config) if name not in datasets]
    if missing:
        raise UserError(
            f"config key 'data.{missing[0]}' is empty: this run needs it; give a prepared folder, or \"small_world\""
        )
    programs = (
        _subject_programs(config, key)
        if config.train.objective == "subject"
        else ("text_to_video",) * config.train.steps
    )
    sizes = _batch_sizes(config)
    streams = {
        name: Stream(datasets[name], sizes[name], (config.train.seed, STREAMS.index(name))) for name in needed(config)
    }
    reads = {name: _reads(name, programs) for name in streams}
    positions = {name: np.cumsum(used) - used for name, used in reads.items()}
    steps = [{name: int(positions[name][i]) for name in streams if reads[name][i]} for i in range(len(programs))]
    return Plan(programs, _losses(config, objective), StepBatches(streams, steps))


def needed(config: Config) -> tuple[str, ...]:
    """The datasets a run of this configuration reads."""
    if config.train.objective == "text_to_video":
        return ("identity", "motion") if config.text_to_video.image_batch_size else ("motion",)
    p = config.switch.motion_probability
    return tuple(name for name, used in (("identity", p < 1), ("motion", p > 0)) if used)


def _subject_programs(config: Config, key: Key[Array, ""]) -> tuple[str, ...]:
    tasks = switching.task_schedule(key, config.train.steps, config.switch.motion_probability)
    dropped = switching.view_drop_schedule(key, config.train.steps, config.identity.view_drop)
    image = np.where(dropped, "identity/no_reference", "identity")
    return tuple(np.where(tasks == switching.MOTION, "motion", image).tolist())


def _batch_sizes(config: Config) -> dict[str, int]:
    if config.train.objective == "text_to_video":
        return {"identity": config.text_to_video.image_batch_size, "motion": config.text_to_video.batch_size}
    return {"identity": config.identity.batch_size, "motion": config.motion.batch_size}


def _reads(stream: str, programs: tuple[str, ...]) -> np.ndarray:
    return np.asarray([program == "text_to_video" or program.partition("/")[0] == stream for program in programs], int)


def _losses(config: Config, objective: Objective) -> dict[str, Callable]:
    def identity_loss(model, batch, empty_text, key, *, view_dropped):
        return identity.loss(
            model, batch["identity"], empty_text, key, objective=objective, view_dropped=view_dropped,
            references=config.identity.references,
        )  # fmt: skip

    def motion_loss(model, batch, empty_text, key):
        return motion.loss(
            model, batch["motion"], empty_text, key, objective=objective, token_drop=config.motion.token_drop,
            references=config.motion.references,
        )  # fmt: skip

    def text_to_video_loss(model, batch, empty_text, key):
        c = config.text_to_video
        return text_to_video.loss(
            model, batch["motion"], batch.get("identity"), empty_text, key, objective=objective,
            image_weight=c.image_weight, first_frames=round(c.first_frame * c.batch_size),
        )  # fmt: skip

    return {
        "identity": partial(identity_loss, view_dropped=False),
        "identity/no_reference": partial(identity_loss, view_dropped=True),
        "motion": motion_loss,
        "text_to_video": text_to_video_loss,
    }


def run_key(config: Config) -> Key[Array, ""]:
    """The key all randomness of a run's steps is folded from."""
    return jax.random.key(config.train.seed)
