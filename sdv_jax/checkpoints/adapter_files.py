"""Low-rank adapters on disk: what diffusers, PEFT, ComfyUI, the usual trainers and this package write.

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
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints.adapter_names import FORMATS, LayerNames
from sdv_jax.checkpoints.adapter_reading import (
    FORMAT_VERSION,
    HEADER_CONFIG,
    INFO,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    WEIGHTS,
    AdapterInfo,
    Contents,
    Module,
    find_file,
    finite,
    read,
)
from sdv_jax.checkpoints.families import family_of_module
from sdv_jax.checkpoints.rules.table import Rules
from sdv_jax.checkpoints.safetensors_io import Output, listing, write_file, write_json
from sdv_jax.errors import NotWritten, UserError
from sdv_jax.models.contract import check_reference
from sdv_jax.nn.linear import LoRA

__all__ = [
    "FORMATS", "INFO", "PEFT_WEIGHTS", "WEIGHTS", "AdapterInfo", "Fitted", "agreed", "export", "find_file", "fit",
    "load", "save",
]  # fmt: skip

logger = logging.getLogger(__name__)

# (our layer path, block) -> (the file's name for it, its adapter)
_Located = dict[tuple[str, int | None], tuple[str, Module]]
# published module name -> (A, B, scale)
_Arrays = Mapping[str, tuple[np.ndarray, np.ndarray, float]]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A file that fits a model: our layer path -> {block, None outside the stack: its adapter there}."""

    contents: Contents
    names: LayerNames
    slots: Mapping[str, Mapping[int | None, Module]]

    @property
    def weights(self) -> dict[str, Module]:
        """The adapters by the name of the torch weight that they change."""
        return {
            f"{self.names.published(path, block)}.weight": module
            for path, found in self.slots.items()
            for block, module in found.items()
        }

    @property
    def partly_for_references(self) -> bool:
        """Whether some of its layers act on reference tokens only."""
        return _partly_for_references(self.contents.info, self.weights)


def load(model: nnx.Module, path: str | os.PathLike, *, alpha: float | None = None) -> AdapterInfo:
    """Puts the adapter in `path` (a folder or a .safetensors file) into `model`, in place of one that may be there.

    Args:
      alpha: for files that do not state one; absent, it is the rank. Contradicting the file is an error.

    Blocks of the model that the file has nothing for get an update of zero, which is exact; one logged line says so.
    Another logs that the adapter was trained on another published model, where both are known.

    Raises:
      UserError: one line, for a file that cannot be read, that is damaged, or that does not fit `model`.
    """
    fitted, layers = fit(model, path, alpha=alpha), dict(lora.linears(model))
    info, rules = fitted.contents.info, fitted.names.rules
    # Nothing of the model changes before all of the file has been read and found good.
    stated = info.alpha / info.rank if fitted.contents.stated else None
    filled = {
        path: _fill(found, rules, path, layers[path].kernel.shape, stated) for path, found in fitted.slots.items()
    }
    lora.remove(model)
    for path, adapter in filled.items():
        layers[path].lora = adapter
    return info


def fit(model: nnx.Module, path: str | os.PathLike, *, alpha: float | None = None) -> Fitted:
    """What the adapter in `path` changes of `model`, whose weights may be shapes; of the file only the header is read.

    Arguments, notes and errors are those of `load`.
    """
    contents = read(path, alpha)
    file, info, names = contents.file, contents.info, LayerNames.of_model(model)
    if info.family and info.family != names.family:
        raise UserError(f"{file}: an adapter for the family {info.family!r}; this model is {names.family!r}")
    layers = dict(lora.linears(model))
    slots = _fit(contents, names, {path: layer.kernel.shape for path, layer in layers.items()})
    _tell_partial(file, slots, layers)
    _tell_other_model(file, info, model)
    return Fitted(contents, names, slots)


def agreed(adapters: Mapping[Path, AdapterInfo], key: str):
    """What the adapters of a pipeline say of how it runs; those that say nothing (None) go along.

    Raises UserError where two differ.
    """
    values = {file: said for file, info in adapters.items() if (said := getattr(info, key)) is not None}
    first = next(iter(values.values()), None)
    if any(value != first for value in values.values()):
        told = ", ".join(f"{value} in {file}" for file, value in values.items())
        raise UserError(f"the adapters differ in {key}: {told}; give two of the same training")
    return first


def save(model: nnx.Module, path: str | os.PathLike, *, targets: Sequence[str] = (), adaln_lora: str = "all",
         variant: str = "", base: str = "", reference: Mapping[str, object] | None = None) -> None:
    """Writes the adapter of `model` as a folder: weights in diffusers' layout, and `adapter.json`, written last.

    The keywords are those of `AdapterInfo`. Files of an earlier adapter in the folder are replaced. Raises UserError if
    the model has none, or it holds NaN; NotWritten if the disk does not take it.
    """
    names, folder = LayerNames.of_model(model), Path(path)
    check_reference(reference, str(folder))
    arrays = dict(_of_model(model, names))
    if not arrays:
        raise UserError(f"{path}: the model has no adapter to save")
    ranks, scales = {a.shape[0] for a, _, _ in arrays.values()}, {scale for _, _, scale in arrays.values()}
    rank, scale = max(ranks), max(scales)
    alpha = rank * scale if len(ranks) == len(scales) == 1 and scale > 0 else float(rank)
    info = AdapterInfo(rank, alpha, tuple(targets), adaln_lora, names.family, variant, base, reference)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS, arrays, names, "diffusers", where=str(folder))
        write_json(folder / INFO, {"format_version": FORMAT_VERSION} | dataclasses.asdict(info))
    except OSError as error:
        raise NotWritten(f"{folder}: cannot write the adapter ({error.strerror})") from error


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
    beside = [out.with_name(PEFT_CONFIG)] if format == "peft" else []
    for path in (out, *beside):
        if path.exists():
            raise UserError(f"{path} is already there; remove it or choose another name")
    contents = read(adapter, alpha)
    names, found = _published(contents, format)
    modules = {names.published(*place): module for place, (_, module) in found.items()}
    file = contents.file
    if _partly_for_references(contents.info, modules):
        logger.warning("%s: its adaLN layers are for reference tokens; other tools apply them to every token", file)
    if names.renames(format) and ("patch_embedding" in modules or not any("blocks." in name for name in modules)):
        logger.warning("%s: diffusers does not read an adapter of these layers in this style, only as diffusers", file)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: (finite(module.a), finite(module.b), module.scale) for name, module in modules.items()}
        config = _write(out, arrays, names, format, where=str(file), notes=contents.info.notes)
        for path in beside:
            write_json(path, config)
    except OSError as error:
        raise NotWritten(f"{out}: cannot write the adapter ({error.strerror})") from error


# MARK: between file and model


def _partly_for_references(info: AdapterInfo, names: Iterable[str]) -> bool:
    return info.adaln_lora != "all" and any(".norm" in name for name in names)


def _locate(contents: Contents, names: LayerNames) -> tuple[_Located, list[str]]:
    """The layers that the file adapts, and its names for those that there are not."""
    found, unknown = {}, []
    for name, module in contents.modules.items():
        place = names.find(name)
        if place is None:
            unknown.append(name)
        elif place in found:
            raise UserError(f"{contents.file}: {found[place][0]} and {name} are the same layer; keep one adapter in it")
        else:
            found[place] = name, module
    return found, unknown


def _published(contents: Contents, format: str) -> tuple[LayerNames, _Located]:
    """The layers by the names of the published model that has them all."""
    fits, least = {}, list(contents.modules)
    for names in LayerNames.of_published(contents.info.family):
        if names.family in fits:
            continue
        found, unknown = _locate(contents, names)
        least = min(least, unknown, key=len)
        if not unknown:
            fits[names.family] = names, found
    if not fits:
        raise UserError(f"{contents.file}: adapts modules that no known model has: {listing(least)}")
    if len(fits) > 1 and format == "comfyui":
        why = f"its modules are in models of several families ({', '.join(fits)}), whose names for {format} differ"
        raise UserError(f"{contents.file}: {why}; export it as diffusers")
    return next(iter(fits.values()))


def _fit(contents: Contents, names: LayerNames,
         kernels: Mapping[str, tuple[int, ...]]) -> dict[str, dict[int | None, Module]]:
    """Our layer path -> {block: adapter}. Raises one UserError with everything that does not fit."""
    found, unknown = _locate(contents, names)
    slots, shapes = {}, []
    for (path, block), (name, module) in found.items():
        kernel = kernels.get(path)
        if kernel is None or block is not None and block >= kernel[0]:
            unknown.append(name if kernel is None else f"{name} (the model has {kernel[0]} blocks)")
            continue
        out, *rest = _weight_shape(names.rules, path, kernel)
        expected = ([module.rank, *rest], [out, module.rank] + [1] * (len(rest) - 1))
        for half, tensor, shape in (("A", module.a, expected[0]), ("B", module.b, expected[1])):
            if list(tensor.shape) != shape:
                shapes.append(f"{name}.lora_{half} is {list(tensor.shape)}, expected {shape}")
        slots.setdefault(path, {})[block] = module
    if unknown:
        raise UserError(f"{contents.file}: adapts modules that are not in this model: {listing(unknown)}")
    if shapes:
        raise UserError(f"{contents.file}: an adapter for a model of another size: {listing(shapes)}")
    return slots


def _weight_shape(rules: Rules, path: str, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the torch weight behind one layer of the kernel; the broadcast scalar takes no memory."""
    rule = rules.of_path(f"{path}.kernel")
    return rule.transform.to_torch(np.broadcast_to(np.int8(0), kernel[1:] if rule.stacked else kernel)).shape


def _fill(found: Mapping[int | None, Module], rules: Rules, path: str, kernel: tuple[int, ...],
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
        a[(*at, slice(None), slice(module.rank))] = to_ours(finite(module.a))
        values = finite(module.b).reshape(fan_out, module.rank).T
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


def _tell_other_model(file: Path, info: AdapterInfo, model: nnx.Module) -> None:
    """Logs one line if training's model and this one are published ones, and not the same.

    Several published models may have one architecture, and only that is seen of `model`.
    """
    family = family_of_module(model)
    same = [name for name, variant in family.variants.items() if getattr(variant, family.denoiser) == model.config]
    if info.variant in family.variants and same and info.variant not in same:
        logger.warning("%s was trained on %s; this model is %s", file, info.variant, " or ".join(same))


def _of_model(model: nnx.Module, names: LayerNames) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, float]]]:
    """Torch module name -> (A, B, scale) of every adapted layer, block by block."""
    for path, layer in lora.adapted(model):
        rule = names.rules.of_path(f"{path}.kernel")
        a, b = (np.asarray(half[...], np.float32) for half in (layer.lora.a, layer.lora.b))
        for index in range(len(a)) if rule.stacked else (None,):
            one, two = (a, b) if index is None else (a[index], b[index])
            down = rule.transform.to_torch(one)
            up = two.T.reshape(two.shape[1], two.shape[0], *(1,) * (down.ndim - 2))
            yield names.published(path, index), (down, up, layer.lora.scale)


# MARK: writing


def _write(file: Path, modules: _Arrays, names: LayerNames, format: str, *, where: str,
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
            outputs.append(Output(names.key(name, half, format), values.dtype, values.shape, [values]))
    config = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    header = {} if names.renames(format) else {HEADER_CONFIG: _header(config, format)}
    write_file(file, outputs, metadata=header | dict(notes or {}))
    return {"peft_type": "LORA"} | config


def _header(config: Mapping, format: str) -> str:
    """The config as diffusers looks for it, behind the component's name; files for PEFT have no component."""
    front = "" if format == "peft" else "transformer."
    return json.dumps({front + key: value for key, value in config.items()}, indent=2, sort_keys=True)
