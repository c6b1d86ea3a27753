"""An adapter's file as a table: module -> (A, B, scale), and what is known of the adapter besides its numbers."""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdv_jax.checkpoints.adapter_names import is_delta, parse
from sdv_jax.checkpoints.safetensors_io import DTYPES, MORE_DTYPES, Tensor, listing, read_header
from sdv_jax.errors import UserError
from sdv_jax.models.contract import check_reference
from sdv_jax.nn.modulation import STREAMS

logger = logging.getLogger(__name__)

WEIGHTS = "pytorch_lora_weights.safetensors"
INFO = "adapter.json"
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT_VERSION = 1

# Entries of a file's header. diffusers keeps PEFT's config in the first, its keys behind the component's name; the
# others are ours: no other tool knows of streams and references.
HEADER_CONFIG, _HEADER_STREAMS, _HEADER_REFERENCE = "lora_adapter_metadata", "sdv_jax.adaln_lora", "sdv_jax.reference"

# A folder's weights by the name their writer gives them: diffusers and ourselves, paper A's release, PEFT.
_WEIGHT_NAMES = (WEIGHTS, "pytorch_lora_weights_transformer.safetensors", PEFT_WEIGHTS)


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter besides its numbers; the keys of `adapter.json`.

    `rank` and `alpha` are training's. `targets` are PEFT suffixes. `adaln_lora` says which streams the adapter of the
    adaLN linears acts on ("all" or "reference"), `reference` where reference images stood (a few texts and numbers,
    the family's own; None: not stated). `family`, `variant` and `base` name the model it was trained on, "" where that
    is not known.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    adaln_lora: str = "all"
    family: str = ""
    variant: str = ""
    base: str = ""
    reference: Mapping[str, object] | None = None

    @property
    def notes(self) -> dict[str, str]:
        """The header entries that carry in a single file what no other tool's config has a word for."""
        streams = {} if self.adaln_lora == "all" else {_HEADER_STREAMS: self.adaln_lora}
        placed = {} if self.reference is None else {_HEADER_REFERENCE: json.dumps(dict(self.reference), sort_keys=True)}
        return streams | placed


@dataclasses.dataclass(frozen=True)
class Module:
    """The adapter of one torch module: A is [rank, in, ...], B [out, rank, ...] (more axes for convolutions)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclasses.dataclass(frozen=True)
class Contents:
    """A file that was found good in itself: its modules as it names them, without prefixes.

    `stated`: whether `info` is training's own `adapter.json` and not gathered from the file.
    """

    file: Path
    modules: Mapping[str, Module]
    info: AdapterInfo
    stated: bool


def find_file(path: str | os.PathLike) -> Path:
    """The weights that `path` means: itself, or the one file in that folder which is an adapter's."""
    path = Path(path)
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise UserError(f"{path}: adapters are read from .safetensors; save this pickled file as one")
        return path
    if not path.is_dir():
        raise UserError(f"{path}: there is no such adapter; expected a folder or a .safetensors file")
    for name in _WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) != 1:
        other = ", ".join(found) or "no other .safetensors file"
        raise UserError(f"{path}: no {WEIGHTS} there, and {other}; name the file")
    return path / found[0]


def read(path: str | os.PathLike, alpha: float | None = None) -> Contents:
    """What the file holds; `alpha` is for files that state none.

    Raises:
      UserError: one line, for a file that cannot be read, that is damaged, or that holds more than a plain LoRA.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"adapter alpha is {alpha}; expected a positive number")
    file = find_file(path)
    halves, alphas = _sort(file, read_header(file, dtypes=DTYPES | MORE_DTYPES))
    metadata = _metadata(file)
    config, info = _stated_config(file, metadata), _info_of(file)
    if alpha is not None and info and not math.isclose(alpha, info.alpha):
        raise UserError(f"{file}: its {INFO} says alpha = {info.alpha:g}, you say {alpha:g}; leave yours away")
    if alpha is not None and not info and (alphas or "lora_alpha" in config):
        raise UserError(f"{file}: states its own alpha; leave yours ({alpha:g}) away")
    if config.get("use_dora"):
        raise UserError(f"{file}: a DoRA adapter; only plain LoRA is supported")
    _check_halves(file, halves, alphas)
    modules = {}
    for name, (a, b) in halves.items():
        own = finite(alphas[name]) if name in alphas else None
        modules[name] = Module(a, b, _scale(file, name, a.shape[0], config, own, None if info else alpha))
    rank = max(module.rank for module in modules.values())
    return Contents(file, modules, info or _noted(file, metadata, rank, alpha), info is not None)


def finite(tensor: Tensor) -> np.ndarray:
    """The tensor as float32. Raises UserError if it holds NaN or infinity."""
    values = tensor.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{tensor.file}: tensor {tensor.name} holds NaN or infinite values; the adapter is damaged")
    return values


# MARK: tensors


def _sort(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, list[Tensor | None]], dict[str, Tensor]]:
    """(module -> [A, B], module -> alpha). Raises UserError that lists what else there is and does something."""
    halves, alphas, strange, idle = {}, {}, [], []
    for key, tensor in tensors.items():
        found = parse(key)
        if found is None:
            (idle if is_delta(key) and not finite(tensor).any() else strange).append(key)
            continue
        module, part = found
        if part == "alpha":
            alphas[module] = tensor
            continue
        pair = halves.setdefault(module, [None, None])
        index = "AB".index(part)
        if pair[index] is not None:
            raise UserError(f"{file}: {pair[index].name} and {key} are the same weight; keep one adapter in it")
        pair[index] = tensor
    if strange:
        raise UserError(f"{file}: these keys are not those of a LoRA: {listing(strange)}")
    if not halves:
        raise UserError(f"{file}: holds no LoRA")
    if idle:
        logger.warning("%s: left out %d changes of weights and biases that are all zeros: %s", file, len(idle),
                       listing(idle))
    return halves, alphas


def _check_halves(file: Path, halves: Mapping[str, list[Tensor | None]], alphas: Mapping[str, Tensor]) -> None:
    """Raises one UserError with every A that has no B, B that has no A, pair whose ranks differ, alpha of no module."""
    problems = [f"{name}.alpha is about no module of the file" for name in alphas if name not in halves]
    for name, (a, b) in halves.items():
        if a is None or b is None:
            problems.append(f"{name} has lora_{'B without lora_A' if a is None else 'A without lora_B'}")
        elif min(len(a.shape), len(b.shape)) < 2 or not 0 < a.shape[0] == b.shape[1]:
            found = f"lora_A is {list(a.shape)} and lora_B {list(b.shape)}"
            problems.append(f"{name}: {found}; expected [rank, in] and [out, rank]")
        elif "i" in a.dtype.kind + b.dtype.kind or "u" in a.dtype.kind + b.dtype.kind:
            problems.append(f"{name} is stored as {a.dtype} and {b.dtype}; expected floating point numbers")
    if problems:
        raise UserError(f"{file}: {listing(problems)}")


def _scale(file: Path, name: str, rank: int, config: Mapping, own: np.ndarray | None, given: float | None) -> float:
    """What the update of `name` is multiplied by: after its own alpha, else PEFT's config, else `given`, else 1."""
    try:
        if own is not None:
            return _positive(own.reshape(())) / rank
        if "lora_alpha" not in config:
            return 1.0 if given is None else given / rank
        patterns = config.get("alpha_pattern") or {}
        # PEFT: the first pattern that is the end of the name, from a dot on.
        hit = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
        alpha = _positive(config["lora_alpha"] if hit is None else patterns[hit])
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{file}: the alpha stated for {name} makes no sense ({error})") from error


def _positive(alpha) -> float:
    if not (math.isfinite(float(alpha)) and alpha > 0):
        raise ValueError(f"it is {float(alpha):g}; expected a positive number")
    return float(alpha)


# MARK: what is stated beside them


def _stated_config(file: Path, metadata: Mapping[str, str]) -> dict:
    """PEFT's config of this adapter, from the file's header (diffusers) or the file beside it (PEFT); {} if neither."""
    where, text = f"{file}: header entry {HEADER_CONFIG}", metadata.get(HEADER_CONFIG)
    beside = file.with_name(PEFT_CONFIG)
    if text is None and file.name == PEFT_WEIGHTS and beside.is_file():
        where, text = str(beside), beside.read_text(errors="replace")
    if text is None:
        return {}
    return {key.removeprefix("transformer."): value for key, value in _json_object(text, where).items()}


def _noted(file: Path, metadata: Mapping[str, str], rank: int, alpha: float | None) -> AdapterInfo:
    """What `AdapterInfo.notes` left in the header; nothing in files of other tools."""
    streams, reference = metadata.get(_HEADER_STREAMS, "all"), metadata.get(_HEADER_REFERENCE)
    if streams not in STREAMS:
        raise UserError(f"{file}: header entry {_HEADER_STREAMS} is {streams!r}; expected {' or '.join(STREAMS)}")
    if reference is not None:
        where = f"{file}: header entry {_HEADER_REFERENCE}"
        reference = _json_object(reference, where)
        check_reference(reference, where)
    return AdapterInfo(rank, float(alpha or rank), adaln_lora=streams, reference=reference)


def _metadata(file: Path) -> dict[str, str]:
    """The free texts of a safetensors header that `read_header` has found good."""
    with open(file, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return header.get("__metadata__") or {}


def _info_of(file: Path) -> AdapterInfo | None:
    """The `adapter.json` that belongs to the file."""
    path = file.with_name(INFO)
    if file.name not in _WEIGHT_NAMES or not path.is_file():
        return None
    raw = _json_object(path.read_text(), str(path))
    if raw.pop("format_version", None) != FORMAT_VERSION:
        raise UserError(f"{path}: format_version is not {FORMAT_VERSION}; the adapter is of another version of sdv_jax")
    check_reference(raw.get("reference"), str(path))
    try:
        info = AdapterInfo(**raw | {"targets": tuple(raw.get("targets", ()))})
        if info.rank >= 1 and math.isfinite(info.alpha) and info.alpha > 0 and info.adaln_lora in STREAMS:
            return info
    except TypeError:
        pass
    raise UserError(f"{path}: expected {', '.join(f.name for f in dataclasses.fields(AdapterInfo))}; found {raw}")


def _json_object(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value
