"""Low-rank adapters on disk: what diffusers, PEFT and this package's training write, read and written.

Whatever a file calls its tensors, it is read as one table: torch module name -> (A, B, scale), the update of that
module's weight being B A · scale. `load` fits the table to a model, `save` makes it from one, `export` rewrites a file.

The scale. PEFT multiplies by alpha / rank, but most files in circulation state no alpha and most loaders assume
alpha = rank. What is written here is right for all of them: B is stored multiplied by alpha / rank, every module has
the same rank, and the header states alpha = rank. A folder that training left keeps its own alpha in `adapter.json`,
and `load` undoes the product, so that training goes on with the same parametrisation.
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints.families import rules_of
from sdv_jax.checkpoints.rules.table import Rules
from sdv_jax.checkpoints.safetensors_io import Output, Tensor, listing, read_header, write_file, write_json
from sdv_jax.errors import UserError
from sdv_jax.nn.linear import LoRA

logger = logging.getLogger(__name__)

FORMATS = ("diffusers", "comfyui", "peft")
WEIGHTS = "pytorch_lora_weights.safetensors"
INFO = "adapter.json"
FORMAT_VERSION = 1

# A folder's weights by the name their writer gives them: diffusers and ourselves, paper A's release, PEFT.
_WEIGHT_NAMES = (WEIGHTS, "pytorch_lora_weights_transformer.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"
_HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's config, its keys behind the component's name
_STREAMS_KEY = "sdv_jax.adaln_lora"  # ours: no other tool knows of streams
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_HALF = re.compile(r"(?P<module>.+?)\.lora[_.](?P<half>A|B|down|up)(\.(?!weight$)[^.]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# kijai's CogVideoXWrapper, the way to run CogVideoX in ComfyUI, hands the file to diffusers' loader: same names.
_WRITTEN_PREFIX = {"diffusers": "transformer.", "comfyui": "transformer.", "peft": "base_model.model."}


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter besides its numbers; the keys of `adapter.json`.

    `rank` and `alpha` are training's. `targets` are PEFT suffixes. `adaln_lora` says which streams the adapter of the
    adaLN linears acts on ("all" or "reference"). `family`, `variant` and `base` name the model it was trained on, ""
    where that is not known.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    adaln_lora: str = "all"
    family: str = ""
    variant: str = ""
    base: str = ""


@dataclasses.dataclass(frozen=True)
class _Module:
    """The adapter of one torch module: A is [rank, in, ...], B [out, rank, ...] (more axes for convolutions)."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


# MARK: what others call


def load(model: nnx.Module, path: str | os.PathLike, *, alpha: float | None = None) -> AdapterInfo:
    """Puts the adapter in `path` (a folder or a .safetensors file) into `model`, in place of one that may be there.

    Args:
      alpha: for files that do not state one; absent, it is the rank. Contradicting the file is an error.

    Blocks of the model that the file has nothing for get an update of zero, which is exact; one logged line says so.

    Raises:
      UserError: one line, for a file that cannot be read, that is damaged, or that does not fit `model`.
    """
    file = find_file(path)
    modules, info = _read(file, alpha)
    family, rules = rules_of(model)
    if info.family and info.family != family:
        raise UserError(f"{file}: an adapter for the family {info.family!r}; this model is {family!r}")
    layers = dict(lora.linears(model))
    slots = _fit(file, modules, {path: layer.kernel.shape for path, layer in layers.items()}, rules)
    # Nothing of the model changes before all of the file has been read and found good.
    stated = info.alpha / info.rank if _info_of(file) else None
    filled = {path: _fill(file, found, rules, path, layers[path].kernel.shape, stated) for path, found in slots.items()}
    lora.remove(model)
    for path, adapter in filled.items():
        layers[path].lora = adapter
    _tell_partial(file, slots, layers)
    return info


def save(model: nnx.Module, path: str | os.PathLike, *, targets: Sequence[str] = (), adaln_lora: str = "all",
         variant: str = "", base: str = "") -> None:
    """Writes the adapter of `model` as a folder: weights in diffusers' layout, and `adapter.json`, written last.

    Files of an earlier adapter in the folder are replaced. Raises UserError if the model has none, or it holds NaN.
    """
    family, rules = rules_of(model)
    modules = dict(_of_model(model, rules))
    if not modules:
        raise UserError(f"{path}: the model has no adapter to save")
    ranks, scales = {a.shape[0] for a, _, _ in modules.values()}, {scale for _, _, scale in modules.values()}
    rank, scale = max(ranks), max(scales)
    alpha = rank * scale if len(ranks) == len(scales) == 1 and scale > 0 else float(rank)
    info = AdapterInfo(rank, alpha, tuple(targets), adaln_lora, family, variant, base)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS, modules, "diffusers", where=str(folder))
        write_json(folder / INFO, {"format_version": FORMAT_VERSION} | dataclasses.asdict(info))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the adapter ({error.strerror})") from error


def export(adapter: str | os.PathLike, out: str | os.PathLike, *, format: str = "diffusers",
           alpha: float | None = None) -> None:
    """Writes the adapter in `adapter` (whatever `load` takes) as the file `out` for another tool, one of `FORMATS`.

    "peft" also writes `adapter_config.json` beside it; `PeftModel.from_pretrained` wants `out` to be called
    adapter_model.safetensors. Raises UserError as `load` does, and where a file to be written is already there.
    """
    if format not in FORMATS:
        raise UserError(f"adapter format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: expected a file name that ends in .safetensors")
    beside = [out.with_name(_PEFT_CONFIG)] if format == "peft" else []
    for path in (out, *beside):
        if path.exists():
            raise UserError(f"{path} is already there; remove it or choose another name")
    file = find_file(adapter)
    modules, info = _read(file, alpha)
    streams = {} if info.adaln_lora == "all" else {_STREAMS_KEY: info.adaln_lora}
    if streams and any(".norm" in name for name in modules):
        logger.warning("%s: its adaLN layers are for reference tokens; other tools apply them to every token", out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: (_finite(file, m.a), _finite(file, m.b), m.scale) for name, m in modules.items()}
        config = _write(out, arrays, format, where=str(file), notes=streams)
        for path in beside:
            write_json(path, config)
    except OSError as error:
        raise UserError(f"{out}: cannot write the adapter ({error.strerror})") from error


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


# MARK: reading


def _read(file: Path, alpha: float | None) -> tuple[dict[str, _Module], AdapterInfo]:
    """The file as torch module name -> adapter, and what is known about it."""
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"adapter alpha is {alpha}; expected a positive number")
    halves, alphas = _sort(file, read_header(file))
    config = _stated_config(file)
    info = _info_of(file)
    if alpha is not None and info and not math.isclose(alpha, info.alpha):
        raise UserError(f"{file}: its {INFO} says alpha = {info.alpha:g}, you say {alpha:g}; leave yours away")
    if alpha is not None and not info and (alphas or "lora_alpha" in config):
        raise UserError(f"{file}: states its own alpha; leave yours ({alpha:g}) away")
    if config.get("use_dora"):
        raise UserError(f"{file}: a DoRA adapter; only plain LoRA is supported")
    _check_halves(file, halves, alphas)
    modules = {}
    for name, (a, b) in halves.items():
        own = _finite(file, alphas[name]) if name in alphas else None
        modules[name] = _Module(a, b, _scale(file, name, a.shape[0], config, own, None if info else alpha))
    rank = max(module.rank for module in modules.values())
    return modules, info or AdapterInfo(rank, float(alpha or rank), adaln_lora=_stated_streams(file))


def _sort(file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, list[Tensor | None]], dict[str, Tensor]]:
    """(module -> [A, B], module -> alpha). Raises UserError that lists the keys that are neither."""
    halves, alphas, strange = {}, {}, []
    for key, tensor in tensors.items():
        if found := _HALF.fullmatch(key):
            pair = halves.setdefault(_bare(found["module"]), [None, None])
            index = int(found["half"] in ("B", "up"))
            if pair[index] is not None:
                raise UserError(f"{file}: {pair[index].name} and {key} are the same weight; keep one adapter in it")
            pair[index] = tensor
        elif found := _ALPHA.fullmatch(key):
            alphas[_bare(found["module"])] = tensor
        else:
            strange.append(key)
    if strange:
        raise UserError(f"{file}: these keys are not those of a LoRA: {listing(strange)}")
    if not halves:
        raise UserError(f"{file}: holds no LoRA")
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
    if problems:
        raise UserError(f"{file}: {listing(problems)}")


def _bare(module: str) -> str:
    """The module's name in the transformer, without what tools put in front of it."""
    while prefix := next((p for p in _PREFIXES if module.startswith(p)), None):
        module = module.removeprefix(prefix)
    return module


def _stated_config(file: Path) -> dict:
    """PEFT's config of this adapter, from the file's header (diffusers) or the file beside it (PEFT); {} if neither."""
    where, text = f"{file}: header entry {_HEADER_KEY}", _metadata(file).get(_HEADER_KEY)
    beside = file.with_name(_PEFT_CONFIG)
    if text is None and file.name == "adapter_model.safetensors" and beside.is_file():
        where, text = str(beside), beside.read_text(errors="replace")
    if text is None:
        return {}
    return {key.removeprefix("transformer."): value for key, value in _json_object(text, where).items()}


def _stated_streams(file: Path) -> str:
    """The `adaln_lora` that `export` left in the header; "all" for files of other tools."""
    value = _metadata(file).get(_STREAMS_KEY, "all")
    if value not in ("all", "reference"):
        raise UserError(f"{file}: header entry {_STREAMS_KEY} is {value!r}; expected all or reference")
    return value


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
    try:
        info = AdapterInfo(**raw | {"targets": tuple(raw.get("targets", ()))})
        if info.rank >= 1 and math.isfinite(info.alpha) and info.alpha > 0 and info.adaln_lora in ("all", "reference"):
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


def _finite(file: Path, tensor: Tensor) -> np.ndarray:
    """The tensor as float32. Raises UserError if it holds NaN or infinity."""
    values = tensor.read().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{file}: tensor {tensor.name} holds NaN or infinite values; the adapter is damaged")
    return values


# MARK: between file and model


def _fit(file: Path, modules: Mapping[str, _Module], kernels: Mapping[str, tuple[int, ...]],
         rules: Rules) -> dict[str, dict[int | None, _Module]]:
    """Our layer path -> {layer index: adapter}. Raises one UserError with everything that does not fit."""
    slots, unknown, shapes = {}, [], []
    for name, module in modules.items():
        try:
            path, index = rules.from_torch_module_name(name)
            kernel = kernels[path]
        except KeyError:
            unknown.append(name)
            continue
        if index is not None and index >= kernel[0]:
            unknown.append(f"{name} (the model has {kernel[0]} blocks)")
            continue
        out, *rest = _weight_shape(rules, path, kernel)
        expected = ([module.rank, *rest], [out, module.rank] + [1] * (len(rest) - 1))
        for half, tensor, shape in (("A", module.a, expected[0]), ("B", module.b, expected[1])):
            if list(tensor.shape) != shape:
                shapes.append(f"{name}.lora_{half} is {list(tensor.shape)}, expected {shape}")
        slots.setdefault(path, {})[index] = module
    if unknown:
        raise UserError(f"{file}: adapts modules that are not in this model: {listing(unknown)}")
    if shapes:
        raise UserError(f"{file}: an adapter for a model of another size: {listing(shapes)}")
    return slots


def _weight_shape(rules: Rules, path: str, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the torch weight behind one layer of the kernel; the broadcast scalar takes no memory."""
    rule = rules.of_path(f"{path}.kernel")
    return rule.transform.to_torch(np.broadcast_to(np.int8(0), kernel[1:] if rule.stacked else kernel)).shape


def _fill(file: Path, found: Mapping[int | None, _Module], rules: Rules, path: str, kernel: tuple[int, ...],
          stated: float | None) -> LoRA:
    """One slot. Ranks below the stack's largest are padded with zeros; where scales differ they go into B."""
    *lead, fan_in, fan_out = kernel
    rank = max(module.rank for module in found.values())
    scales = {module.scale for module in found.values()}
    scale = stated or (scales.pop() if len(scales) == 1 else 1.0)
    a = np.zeros((*lead, fan_in, rank), np.float32)
    b = np.zeros((*lead, rank, fan_out), np.float32)
    to_ours = rules.of_path(f"{path}.kernel").transform.to_ours
    for index, module in found.items():
        at = () if index is None else (index,)
        a[(*at, slice(None), slice(module.rank))] = to_ours(_finite(file, module.a))
        values = _finite(file, module.b).reshape(fan_out, module.rank).T
        b[(*at, slice(module.rank))] = values if module.scale == scale else values * np.float32(module.scale / scale)
    adapter = nnx.eval_shape(lambda: LoRA(jnp.zeros(kernel), rank=rank, alpha=scale * rank, rngs=nnx.Rngs(0)))
    adapter.a.set_value(jnp.asarray(a))
    adapter.b.set_value(jnp.asarray(b))
    return adapter


def _tell_partial(file: Path, slots: Mapping[str, Mapping], layers: Mapping) -> None:
    """Logs one line if some layer is adapted in some of its blocks only."""
    depth = {path: layers[path].kernel.shape[0] for path, found in slots.items() if None not in found}
    partial = [f"{len(slots[path])} of {depth[path]} in {path}" for path in depth if len(slots[path]) < depth[path]]
    if partial:
        logger.warning("%s adapts some blocks only: %s; the others keep the model as it is", file, listing(partial))


def _of_model(model: nnx.Module, rules: Rules) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, float]]]:
    """Torch module name -> (A, B, scale) of every adapted layer, block by block."""
    for path, layer in lora.adapted(model):
        rule = rules.of_path(f"{path}.kernel")
        a, b = (np.asarray(half[...], np.float32) for half in (layer.lora.a, layer.lora.b))
        for index in range(len(a)) if rule.stacked else (None,):
            one, two = (a, b) if index is None else (a[index], b[index])
            down = rule.transform.to_torch(one)
            up = two.T.reshape(two.shape[1], two.shape[0], *(1,) * (down.ndim - 2))
            yield rules.to_torch_module_name(path, index), (down, up, layer.lora.scale)


# MARK: writing


def _write(file: Path, modules: Mapping[str, tuple[np.ndarray, np.ndarray, float]], format: str, *, where: str,
           notes: Mapping[str, str] | None = None) -> dict:
    """Writes (A, B, scale) per module at scale 1 and one rank; returns PEFT's config. `notes` join the header."""
    rank = max(a.shape[0] for a, _, _ in modules.values())
    outputs = []
    for name, (a, b, scale) in modules.items():
        more = rank - a.shape[0]
        a = np.pad(a, [(0, more)] + [(0, 0)] * (a.ndim - 1))
        b = np.pad(b * np.float32(scale), [(0, 0), (0, more)] + [(0, 0)] * (b.ndim - 2))
        for half, values in (("A", a), ("B", b)):
            if not np.isfinite(values).all():
                raise UserError(f"{where}: the adapter of {name} holds NaN or infinite values; nothing was written")
            key = f"{_WRITTEN_PREFIX[format]}{name}.lora_{half}.weight"
            outputs.append(Output(key, values.dtype, values.shape, [values]))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    front = "transformer." if _WRITTEN_PREFIX[format] == "transformer." else ""
    header = {front + key: value for key, value in config.items() if key != "peft_type"}
    write_file(file, outputs, metadata={_HEADER_KEY: json.dumps(header, indent=2, sort_keys=True)} | dict(notes or {}))
    return config
