"""Which program each step of a run executes and which batches it reads, decided on the host by (config, run key)."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

from sdv_jax.adapters.reference import kept_count
from sdv_jax.data.loading import Part, StepBatches, Stream
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Geometry
from sdv_jax.objectives import identity, motion, switching, text_to_video
from sdv_jax.objectives.denoising import Objective
from sdv_jax.train.config import Config
from sdv_jax.train.devices import Devices
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

    def data_state(self, step: int) -> dict[str, dict]:
        """Where a run is in its data before `step`: batches read of each stream, and what is in the streams.

        The position follows from the step; fingerprints and shares show whether that is still where it was.
        """
        streams = self.batches.streams
        return {
            "position": {name: sum(name in reads for reads in self.batches.plan[:step]) for name in streams},
            "sets": {name: _content(stream) for name, stream in streams.items()},
        }


def make(
    config: Config, parts: Mapping[str, tuple[Part, ...]], objective: Objective, key: Key[Array, ""], devices: Devices
) -> Plan:
    """The plan of `config.train.steps` steps. `parts` has "identity", "motion" or both, as `needed` says.

    Raises UserError where one is missing, or a batch cannot be cut evenly over the devices.
    """
    missing = [name for name in needed(config) if name not in parts]
    if missing:
        raise UserError(
            f"config key 'data.{missing[0]}' is empty: this run needs it; give a prepared folder, or \"small_world\""
        )
    programs = (
        _subject_programs(config, key)
        if config.train.objective == "subject"
        else ("text_to_video",) * config.train.steps
    )
    reads = {name: _reads(name, programs) for name in trained_on(config)}
    sizes, split = batch_sizes(config), config.train.accumulate
    for name in reads:
        check_size(config, name, devices)
    mine = {name: devices.mine(sizes[name], split) for name in reads}
    streams = {
        name: Stream.of(
            parts[name], sizes[name], (config.train.seed, STREAMS.index(name)), batches=int(used.sum())
        )
        for name, used in reads.items()
    }  # fmt: skip
    numbers = {name: np.cumsum(used) - used for name, used in reads.items()}
    steps = [{name: int(numbers[name][i]) for name in streams if reads[name][i]} for i in range(len(programs))]
    return Plan(programs, losses(config, objective), StepBatches(streams, steps, mine))


def needed(config: Config) -> tuple[str, ...]:
    """The datasets a run of this configuration reads, to train on or to compare the tasks' gradients."""
    return STREAMS if config.gradients.every else trained_on(config)


def trained_on(config: Config) -> tuple[str, ...]:
    """The datasets that training steps read."""
    if config.train.objective == "text_to_video":
        return ("identity", "motion") if config.text_to_video.image_batch_size else ("motion",)
    p = config.switch.motion_probability
    return tuple(name for name, used in (("identity", p < 1), ("motion", p > 0)) if used)


def measured_on(config: Config) -> dict[str, str]:
    """Program -> dataset, for losses on held-out rows: one program per task, with the reference where there is one."""
    if config.train.objective == "text_to_video":
        return {"text_to_video": "motion"}
    return {name: name for name in needed(config)}


def batch_sizes(config: Config) -> dict[str, int]:
    """Rows of a global batch of each dataset."""
    if config.train.objective == "text_to_video":
        return {"identity": config.text_to_video.image_batch_size, "motion": config.text_to_video.batch_size}
    return {"identity": config.identity.batch_size, "motion": config.motion.batch_size}


def part_sizes(config: Config) -> dict[str, int]:
    """Rows of each dataset that are on the devices at once: those of one part of a batch."""
    return {name: size // config.train.accumulate for name, size in batch_sizes(config).items()}


def check_size(config: Config, name: str, devices: Devices) -> None:
    """Raises UserError unless each part of a batch of the dataset is cut evenly over the devices, and so are its clips
    with a first frame and those without.
    """
    section = name if config.train.objective == "subject" else config.train.objective
    devices.check(section, batch_sizes(config)[name], config.train.accumulate)
    share, rows = config.text_to_video.first_frame, part_sizes(config)[name]
    if name == "motion" and round(share * rows) % devices.shards:
        raise UserError(
            f"config key 'text_to_video.first_frame': {round(share * rows)} of the {rows} clips of a part cannot be "
            f"cut evenly over {devices.shards} devices; give a share that is a multiple of {devices.shards} clips"
        )


def losses(config: Config, objective: Objective) -> dict[str, Callable]:
    """Program -> loss(model, batch, empty_text, key, timesteps=None), where `batch` has the streams by name."""

    def identity_loss(model, batch, empty_text, key, timesteps=None, *, view_dropped):
        return identity.loss(
            model, batch["identity"], empty_text, key, objective=objective, view_dropped=view_dropped,
            references=config.identity.references, timesteps=timesteps,
        )  # fmt: skip

    def motion_loss(model, batch, empty_text, key, timesteps=None):
        c = config.motion
        return motion.loss(
            model, batch["motion"], empty_text, key, objective=objective, token_drop=c.token_drop,
            references=c.references, first_frame=c.frame == "first", timesteps=timesteps,
        )  # fmt: skip

    def text_to_video_loss(model, batch, empty_text, key, timesteps=None):
        c = config.text_to_video
        return text_to_video.loss(
            model, batch["motion"], batch.get("identity"), empty_text, key, objective=objective,
            image_weight=c.image_weight, first_frame=c.first_frame, timesteps=timesteps,
        )  # fmt: skip

    return {
        "identity": partial(identity_loss, view_dropped=False),
        "identity/no_reference": partial(identity_loss, view_dropped=True),
        "motion": motion_loss,
        "text_to_video": text_to_video_loss,
    }


def tokens(config: Config, program: str, shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> int:
    """Video and reference tokens that the transformer sees in a step; `shapes` are those of each stream's latents,
    [parts, rows, t, h, w, c].
    """
    total = 0
    for parts, rows, t, h, w, _ in shapes.values():
        frame = geometry.frame_tokens(h, w)
        total += parts * rows * -(-t // geometry.frame_patch) * frame
        if program == "identity":
            total += parts * rows * config.identity.references * frame
        if program == "motion" and config.motion.references:
            drop = config.motion.token_drop
            total += parts * rows * kept_count(config.motion.references * frame, drop)
    return total


def run_key(config: Config) -> Key[Array, ""]:
    """The key all randomness of a run's steps is folded from."""
    return jax.random.key(config.train.seed)


def _subject_programs(config: Config, key: Key[Array, ""]) -> tuple[str, ...]:
    steps, p = config.train.steps, config.switch.motion_probability
    if config.switch.order == "stages":
        is_motion = np.arange(steps) >= round((1 - p) * steps)
    else:
        is_motion = switching.task_schedule(key, steps, p) == switching.MOTION
    dropped = switching.view_drop_schedule(key, steps, config.identity.view_drop)
    image = np.where(dropped, "identity/no_reference", "identity")
    return tuple(np.where(is_motion, "motion", image).tolist())


def _content(stream: Stream) -> list[str]:
    """The fingerprints of the parts of a stream; of several datasets their shares too, in parts of the whole."""
    weights: dict[str, float] = {}
    for part in stream.parts:
        weights[part.name] = weights.get(part.name, 0.0) + part.weight
    shares = [f"{weight / sum(weights.values()):.6f}" for weight in weights.values()]
    return [part.fingerprint for part in stream.parts] + (shares if len(shares) > 1 else [])


def _reads(stream: str, programs: tuple[str, ...]) -> np.ndarray:
    return np.asarray([program == "text_to_video" or program.partition("/")[0] == stream for program in programs], int)
