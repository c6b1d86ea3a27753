"""A run's configuration: ml_collections outside, frozen dataclasses inside.

Files in `configs/` are Python that fills a `ConfigDict` whose every key stands in `configs/base.py`. `load` runs such a
file, applies overrides, and converts the result to the dataclasses below, which is where a misspelt key or a wrong type
is caught.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sdv_jax
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
        _check_choices(self)
        _check_ranges(self)

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
    """The configuration of the Python file `path` with `overrides` applied.

    `overrides` maps dotted keys ("train.steps") to values or their text, or is a list of "--config.train.steps=100".
    Raises UserError for a file that cannot be read, a key that does not exist (with near matches) or a value of the
    wrong type.
    """
    tree = _run_file(Path(path))
    pairs = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key, value in pairs.items():
        _override(tree, key, value)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Nested mappings, as in `config.json`, to the frozen form."""
    return _build(Config, tree, "")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """["--config.train.steps=100"] -> {"train.steps": "100"}; "--config.train.steps 100" in two words works as well."""
    pairs, words = {}, list(arguments)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not key or not (equals or words):
            raise UserError(
                f"argument {word!r} is not understood: expected --config.SECTION.KEY=VALUE, as in --config.train.seed=1"
            )
        pairs[key] = value if equals else words.pop(0)
    return pairs


def value(config: Config, key: str) -> Any:
    """The value behind a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _run_file(path: Path) -> dict[str, Any]:
    if path.suffix != ".py" and path.is_file():
        raise UserError(
            f"config {path}: not a Python file; expected one with get_config(), for example configs/base.py"
        )
    if not path.is_file():
        raise UserError(
            f"config {path}: no such file; expected a Python file with get_config(), for example configs/base.py"
        )
    # A config imports its parent as `configs.base`, whichever directory the command was started in.
    roots = [str(path.resolve().parent.parent), str(Path(sdv_jax.__file__).parent.parent)]
    sys.path[:0] = roots
    try:
        spec = importlib.util.spec_from_file_location("sdv_jax_config", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config().to_dict()
    except (Exception, SystemExit) as error:  # whatever the user's own Python raises
        raise UserError(f"config {path}: {_first_line(error)}; correct the file") from error
    finally:
        for root in roots:
            sys.path.remove(root)


def _first_line(error: Exception) -> str:
    first = str(error.args[0] if error.args else error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _override(tree: dict, key: str, new: Any) -> None:
    *parents, name = key.split(".")
    node = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict) and isinstance(node.get(name), dict):
        raise UserError(f"config key {key!r} is a table, found {new!r} for it as a whole; set {key}.KEY one by one")
    in_table = len(parents) > 1  # such as model.transformer.num_layers, whose keys the model checks
    if not isinstance(node, dict) or (name not in node and not in_table):
        raise _unknown(key, _leaves(tree))
    if not isinstance(new, str):
        node[name] = new
    else:
        node[name] = _parse(key, new, node[name]) if name in node else _literal(new)


def _parse(key: str, text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    if isinstance(current, bool):
        if text.lower() not in ("true", "false"):
            raise _wrong_type(key, text, bool)
        return text.lower() == "true"
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _build(cls: type, tree: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    optional = {field.name for field in dataclasses.fields(cls) if _has_default(field)}
    for name in tree:
        if name not in fields:
            raise _unknown(prefix + name, [prefix + field for field in fields])
    for name in fields.keys() - optional:
        if name not in tree:
            raise UserError(
                f"config key {prefix + name!r} is missing: start from configs/base.py, which holds every key"
            )
    return cls(**{name: _convert(kind, tree[name], prefix + name) for name, kind in fields.items() if name in tree})


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _convert(kind: Any, raw: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(raw, Mapping):
            raise _wrong_type(key, raw, dict)
        return _build(kind, raw, f"{key}.")
    if kind == Mapping[str, Any]:
        if not isinstance(raw, Mapping):
            raise _wrong_type(key, raw, dict)
        return dict(raw)
    if kind == tuple[str, ...]:
        if not isinstance(raw, list | tuple) or not all(isinstance(item, str) for item in raw):
            raise _wrong_type(key, raw, tuple)
        return tuple(raw)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if kind is int and isinstance(raw, float) and raw.is_integer():
        return int(raw)
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        raise _wrong_type(key, raw, kind)
    return raw


def _leaves(tree: Mapping[str, Any]) -> list[str]:
    return [f"{section}.{name}" for section, names in tree.items() for name in names]


def _unknown(key: str, known: Sequence[str]) -> UserError:
    by_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_name or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "configs/base.py holds every key"
    return UserError(f"config key {key!r} does not exist: {hint}")


def _wrong_type(key: str, raw: Any, kind: Any) -> UserError:
    return UserError(f"config key {key!r}: expected {kind.__name__}, found {raw!r}")


def _check_choices(config: Config) -> None:
    for key, choices in CHOICES.items():
        if value(config, key) not in choices:
            raise UserError(f"config key {key!r}: expected one of {', '.join(choices)}, found {value(config, key)!r}")
    if config.text.train_encoder and config.train.mode != "full":
        raise UserError(
            "config key 'text.train_encoder': true needs train.mode='full', found 'lora'; set one of the two"
        )
    share, batch = config.text_to_video.first_frame, config.text_to_video.batch_size
    if share and config.train.objective != "text_to_video":
        raise UserError("config key 'text_to_video.first_frame': needs train.objective='text_to_video'; leave it 0")
    if 0 < share < 1 and round(share * batch) in (0, batch):
        raise UserError(
            f"config key 'text_to_video.first_frame': {share} of batch_size {batch} is {round(share * batch)} clips; "
            "expected some with and some without, or 0 or 1"
        )
    if config.train.objective == "subject" and config.train.mode == "lora" and config.optimizer.name == "muon":
        raise UserError("config key 'optimizer.name': 'muon' is for train.mode='full', found 'lora'; use 'adamw'")


def _check_ranges(config: Config) -> None:
    rules = [
        (PROBABILITIES, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "a number from 0 to below 1"),
        (POSITIVE, lambda x: x > 0, "a number above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        (("train.steps",), lambda x: x <= MOST_STEPS, f"at most {MOST_STEPS}"),
        (SEEDS, lambda x: 0 <= x < MOST_SEEDS, f"0 to {MOST_SEEDS - 1}"),
    ]
    for keys, holds, expected in rules:
        for key in keys:
            if not holds(value(config, key)):
                raise UserError(f"config key {key!r}: expected {expected}, found {value(config, key)!r}")
