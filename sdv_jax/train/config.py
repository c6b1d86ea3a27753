"""A run's configuration: what each key may be. `configs/base.py` has every key with its meaning and its default."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdv_jax.config_files import Reader, check_choices, check_rules
from sdv_jax.config_files import value as value  # for those that read a run's keys
from sdv_jax.errors import UserError

# Fields with a default are younger than the first runs, whose config.json lacks them.


@dataclasses.dataclass(frozen=True)
class Model:
    path: str
    dtype: str
    transformer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    family: str = "cogvideox"
    vae: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    index: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Data:
    identity: str
    motion: str
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class SmallWorld:
    pairs: int
    clips: int
    seed: int
    marked_clips: bool


@dataclasses.dataclass(frozen=True)
class Train:
    objective: str
    mode: str
    steps: int
    seed: int
    dtype: str
    ema_decay: float
    save_every: int
    keep: int
    log_every: int
    sample_every: int
    accumulate: int = 1
    keep_every: int = 0
    remat: str = "all"
    heartbeat: float = 60.0
    peak_tflops: float = 0.0
    export: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    guidance: float


@dataclasses.dataclass(frozen=True)
class Switch:
    motion_probability: float
    order: str = "mixed"


@dataclasses.dataclass(frozen=True)
class Identity:
    batch_size: int
    view_drop: float
    references: int = 1


@dataclasses.dataclass(frozen=True)
class Motion:
    batch_size: int
    token_drop: float
    references: int = 1
    frame: str = "random"


@dataclasses.dataclass(frozen=True)
class TextToVideo:
    batch_size: int
    image_batch_size: int
    image_weight: float
    first_frame: float = 0.0


@dataclasses.dataclass(frozen=True)
class Text:
    dropout: float
    train_encoder: bool


@dataclasses.dataclass(frozen=True)
class Noise:
    timesteps: str
    logit_mean: float
    logit_std: float
    shift: float = 0.0


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    adaln: str


@dataclasses.dataclass(frozen=True)
class Reference:
    placement: str = ""
    offset: int = 1
    shift: float = 1.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: str
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip: float
    warmup: int
    schedule: str
    cycles: int
    decay_steps: int


@dataclasses.dataclass(frozen=True)
class Log:
    wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class Validation:
    every: int = 0
    rows: int = 0
    bins: int = 5


@dataclasses.dataclass(frozen=True)
class Gradients:
    every: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """What each key means stands beside its default in `configs/base.py`."""

    model: Model
    data: Data
    small_world: SmallWorld
    train: Train
    sample: Sample
    switch: Switch
    identity: Identity
    motion: Motion
    text_to_video: TextToVideo
    text: Text
    noise: Noise
    lora: Lora
    optimizer: Optimizer
    reference: Reference = Reference()
    validation: Validation = Validation()
    gradients: Gradients = Gradients()
    mesh: Mesh = Mesh()
    log: Log = Log()

    def __post_init__(self):
        _check_ranges(self)  # first, for what follows divides
        _check_choices(self)

    def json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "train.objective": ("subject", "text_to_video"),
    "train.mode": ("lora", "full"),
    "train.dtype": ("float32", "bfloat16"),
    "train.remat": ("all", "attention", "offload"),
    "switch.order": ("mixed", "stages"),
    "motion.frame": ("random", "first"),
    "lora.adaln": ("all", "reference"),
    "noise.timesteps": ("uniform", "logit_normal"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("cosine", "constant"),
}
EXPORTS = ("diffusers", "comfyui", "peft")
PROBABILITIES = (
    "switch.motion_probability", "identity.view_drop", "text.dropout", "text_to_video.image_weight",
    "text_to_video.first_frame",
)  # fmt: skip
BELOW_ONE = ("motion.token_drop", "lora.dropout", "train.ema_decay", "optimizer.beta1", "optimizer.beta2")
POSITIVE = (
    "small_world.pairs", "small_world.clips", "train.steps", "train.save_every", "train.keep", "train.log_every",
    "train.accumulate", "train.heartbeat", "identity.batch_size", "identity.references", "motion.batch_size",
    "text_to_video.batch_size", "lora.rank", "lora.alpha", "validation.bins",
    "optimizer.learning_rate", "optimizer.epsilon", "optimizer.clip", "optimizer.cycles", "noise.logit_std",
)  # fmt: skip
NOT_NEGATIVE = (
    "train.sample_every", "sample.guidance", "motion.references", "text_to_video.image_batch_size",
    "validation.every", "validation.rows", "gradients.every", "mesh.fsdp",
    "train.keep_every", "train.peak_tflops", "data.workers", "optimizer.warmup",
    "optimizer.decay_steps", "optimizer.weight_decay", "noise.shift", "reference.offset", "reference.shift",
)  # fmt: skip
MOST_STEPS = 10**7  # all of a run's draws of tasks are made at its start
SEEDS, MOST_SEEDS = ("train.seed", "small_world.seed"), 2**32  # a key of jax.random takes 32 bits of its seed


def load(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """The configuration of the Python file `path` with `overrides` applied, as `config_files.Reader.load` says."""
    return _READER.load(path, overrides)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Nested mappings, as in `config.json`, to the frozen form."""
    return _READER.from_tree(tree)


def _check_choices(config: Config) -> None:
    check_choices(config, CHOICES)
    if unknown := [style for style in config.train.export if style not in EXPORTS]:
        known = ", ".join(EXPORTS)
        raise UserError(f"config key 'train.export': expected some of {known}, found {unknown[0]!r}")
    if config.train.export and config.train.mode != "lora":
        raise UserError("config key 'train.export': needs train.mode='lora', found 'full'; set one of the two")
    if config.text.train_encoder and config.train.mode != "full":
        raise UserError(
            "config key 'text.train_encoder': true needs train.mode='full', found 'lora'; set one of the two"
        )
    share, batch, parts = config.text_to_video.first_frame, config.text_to_video.batch_size, config.train.accumulate
    if share and config.train.objective != "text_to_video":
        raise UserError("config key 'text_to_video.first_frame': needs train.objective='text_to_video'; leave it 0")
    rows = batch // parts  # of a part, which each loss sees on its own
    if 0 < share < 1 and round(share * rows) in (0, rows):
        raise UserError(
            f"config key 'text_to_video.first_frame': {share} of batch_size {batch} / train.accumulate {parts} is "
            f"{round(share * rows)} clips; expected some with and some without, or 0 or 1"
        )
    if config.gradients.every and config.train.objective != "subject":
        raise UserError(
            "config key 'gradients.every': compares the gradients of two tasks and needs train.objective='subject', "
            f"found {config.train.objective!r}; leave it 0"
        )
    if config.train.mode == "lora" and config.optimizer.name == "muon":
        raise UserError("config key 'optimizer.name': 'muon' is for train.mode='full', found 'lora'; use 'adamw'")


def _check_ranges(config: Config) -> None:
    check_rules(config, [
        (PROBABILITIES, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "a number from 0 to below 1"),
        (POSITIVE, lambda x: x > 0, "a number above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (("train.steps",), lambda x: x <= MOST_STEPS, f"at most {MOST_STEPS}"),
        (SEEDS, lambda x: 0 <= x < MOST_SEEDS, f"0 to {MOST_SEEDS - 1}"),
    ])  # fmt: skip


_READER = Reader(Config, base="configs/base.py")
