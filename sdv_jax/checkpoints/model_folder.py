"""A converted model on disk, and loading components from it or straight from a diffusers folder.

MODEL/
  model.json         family, variant, every component's config and the scheduler's verbatim, dtypes, checksums
  transformer/  vae/  text_encoder/     one orbax checkpoint each: a zarr array per leaf
  tokenizer/         the files as they came
"""

import os
import reprlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.checkpoints import arrays, diffusers_folder
from sdv_jax.checkpoints.diffusers_folder import (
    FORMAT_VERSION,
    check_tokenizer,
    open_component,
    parse_component,
    read_json,
)
from sdv_jax.checkpoints.engine import Index, Leaf, Source, checksum
from sdv_jax.checkpoints.families import families
from sdv_jax.checkpoints.family import Family
from sdv_jax.checkpoints.safetensors_io import DTYPES, listing
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Traits, check_defaults
from sdv_jax.sharding import dotted, shardings

MODEL_FILE = "model.json"
_KEYS = {
    "format_version": int,
    "family": str,
    "variant": str,
    "source": str,
    "model_index": dict,
    "config": dict,
    "scheduler": dict,
    "dtype": dict,
    "tied": dict,
    "tensor_dtypes": dict,
    "checksums": dict,
    "tokenizer": dict,
}
_PER_COMPONENT = {"config": dict, "dtype": str, "tied": dict, "tensor_dtypes": dict, "checksums": dict}
_JSON_NAMES = {dict: "an object", str: "a text", int: "a whole number"}


def read_config(path: str | os.PathLike) -> dict:
    """What model.json says; for a diffusers pipeline folder, the same keys without dtypes and checksums.

    Raises UserError if `path` is neither, or if what is there cannot be read or is unknown.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; expected a converted model or a diffusers pipeline folder")
    if not (folder / MODEL_FILE).is_file():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"{path}: neither {MODEL_FILE} (a converted model) nor model_index.json (a diffusers pipeline)"
            )
        return diffusers_folder.read_config(folder)
    config = read_json(folder / MODEL_FILE)
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MODEL_FILE}: format_version is {config.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "convert the model again"
        )
    if missing := [key for key in _KEYS if key not in config]:
        raise UserError(f"{folder / MODEL_FILE}: no {', '.join(missing)}; convert the model again")
    for key, kind in _KEYS.items():
        _check_kind(folder, key, config[key], kind)
    family = family_of(config, folder)
    for key, kind in _PER_COMPONENT.items():
        wanted = [name for name, part in family.components.items() if not part.optional or name in config["config"]]
        if absent := [name for name in wanted if name not in config[key]]:
            raise UserError(f"{folder / MODEL_FILE}: no {key} of {', '.join(absent)}; convert the model again")
        if surplus := sorted(config[key].keys() - family.components):
            raise UserError(f"{folder / MODEL_FILE}: {key} of unknown {', '.join(surplus)}; convert the model again")
        for name in config[key]:
            _check_kind(folder, f"{key}.{name}", config[key][name], kind)
    _check_tensors(folder, config)
    diffusers_folder.check_scheduler(family, config["scheduler"], folder / MODEL_FILE)
    check_tokenizer(folder / "tokenizer")
    where = f"{folder / MODEL_FILE}: defaults"
    _check_kind(folder, "defaults", config.setdefault("defaults", {}), dict)  # models of version 0.1.0 have none
    check_defaults(config["defaults"], where)
    return config


def _check_kind(folder: Path, key: str, value, kind: type) -> None:
    if type(value) is not kind:
        raise UserError(
            f"{folder / MODEL_FILE}: {key} is {reprlib.repr(value)}, expected {_JSON_NAMES[kind]}; "
            "convert the model again"
        )


def _check_tensors(folder: Path, config: dict) -> None:
    """What export looks up by tensor: the names each tied tensor goes by, the dtypes that differ from the array's."""
    for name, found in config["tied"].items():
        for tensor, names in found.items():
            if not isinstance(names, list) or not names or not all(isinstance(other, str) for other in names):
                where = f"{folder / MODEL_FILE}: tied.{name}.{tensor}"
                raise UserError(f"{where} is {reprlib.repr(names)}, expected a list of names; convert the model again")
    for name, found in config["tensor_dtypes"].items():
        for tensor, code in found.items():
            if not isinstance(code, str) or code not in DTYPES:
                where = f"{folder / MODEL_FILE}: tensor_dtypes.{name}.{tensor}"
                known = ", ".join(DTYPES)
                raise UserError(f"{where} is {reprlib.repr(code)}, expected one of {known}; convert the model again")


def family_of(config: dict, where: Path) -> Family:
    """The family that model.json names."""
    for family in families():
        if family.name == config["family"]:
            return family
    raise UserError(f"{where}: unknown family {config['family']!r}; known: {', '.join(f.name for f in families())}")


@dataclass(frozen=True)
class About:
    """A model's json files, understood: model.json, family, component configs, traits."""

    raw: dict
    family: Family
    configs: dict[str, object]
    traits: Traits


def about(path: str | os.PathLike) -> About:
    """What the json files in `path` (a converted or a diffusers folder) say.

    Raises UserError as `read_config` does, and for components that do not fit one another.
    """
    return understood(read_config(path), Path(path))


def understood(raw: dict, folder: Path) -> About:
    """What `read_config` of any layout returned for `folder`, understood. Raises UserError as `about` does."""
    family = family_of(raw, folder)
    configs = {name: parse_component(family, name, found, folder / name) for name, found in raw["config"].items()}
    return About(raw, family, configs, family.traits_at(folder, configs, raw))


@dataclass(frozen=True)
class Stored:
    """One component of a converted folder; reads any part of any leaf. Same reading interface as `engine.Source`."""

    folder: Path
    leaves: tuple[Leaf, ...]
    stores: dict

    def dtype_of(self, leaf: Leaf) -> np.dtype:
        return self.stores[leaf.path].dtype.numpy_dtype

    def read(self, leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
        return arrays.read(self.folder, leaf.path, self.stores[leaf.path], index, dtype)


def open_stored(folder: Path, name: str, config: dict) -> Stored:
    """Component `name` of the converted `folder`, with its arrays checked by name and shape but not read."""
    family = family_of(config, folder)
    parsed = parse_component(family, name, config["config"][name], folder / MODEL_FILE)
    leaves = family.components[name].leaves(parsed)
    wanted, found = {leaf.path for leaf in leaves}, arrays.paths(folder / name)
    problems = [f"missing {path}" for path in sorted(wanted - found)] + [
        f"unexpected {path}" for path in sorted(found - wanted)
    ]
    stores = arrays.open_arrays(folder / name, sorted(wanted & found))
    problems += [
        f"{leaf.path} has shape {stores[leaf.path].shape}, expected {leaf.shape}"
        for leaf in leaves
        if leaf.path in stores and stores[leaf.path].shape != leaf.shape
    ]
    if problems:
        raise UserError(f"{folder / name}: the arrays do not fit the config: {listing(problems)}")
    return Stored(folder / name, leaves, stores)


def load_component(
    path: str | os.PathLike, name: str, dtype="float32", mesh: jax.sharding.Mesh | None = None, *, check: bool = False
) -> nnx.Module:
    """Component `name` ("transformer", "vae", "text_encoder") with its weights as `dtype`, spread over `mesh` if there
    is one.

    `path` is a converted folder or a diffusers pipeline folder. Leaves are read one at a time, and with a mesh each
    device's part only. `check` compares the checksums of a converted folder first. Raises UserError for anything wrong
    on disk.
    """
    folder = Path(path)
    config = read_config(folder)
    family = family_of(config, folder)
    if name not in config["config"]:
        raise UserError(f"{folder}: no component {name!r}; this {family.name} model has {', '.join(config['config'])}")
    parsed = parse_component(family, name, config["config"][name], folder / name / "config.json")
    if (folder / MODEL_FILE).is_file():
        if check:
            check_sums(folder, config, name)
        source = open_stored(folder, name, config)
    else:
        source = open_component(folder, family, name, config["config"][name])
        source.check_tied()
    component, dtype = family.components[name], jnp.dtype(dtype)
    graph, state = nnx.split(component.abstract(parsed, dtype=dtype))
    placement = _placement(family, name, state, mesh)
    return nnx.merge(graph, fill(state, source, dtype=partial(component.dtype_of, dtype=dtype), placement=placement))


def fill(
    state: nnx.State, source: Source | Stored, *, dtype: Callable[[str], np.dtype], placement: dict
) -> nnx.State:
    """The abstract `state` with arrays read from `source`, one leaf after the other; `dtype` is asked for each path."""
    leaves = {leaf.path: leaf for leaf in source.leaves}
    filled = []
    for path, variable in nnx.to_flat_state(state):
        leaf = leaves[dotted(path)]
        kind = dtype(leaf.path)
        filled.append((path, variable.replace(_array(leaf, _reader(source, leaf, kind), placement[leaf.path], kind))))
    return nnx.from_flat_state(filled)


def _reader(source: Source | Stored, leaf: Leaf, dtype: np.dtype) -> Callable[[Index], np.ndarray]:
    return lambda index: source.read(leaf, index, dtype)


def _array(leaf: Leaf, read: Callable[[Index], np.ndarray], sharding, dtype: np.dtype) -> jax.Array:
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, n) for n in leaf.shape)), dtype)
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _placement(family: Family, name: str, state: nnx.State, mesh) -> dict:
    return {
        dotted(path): sharding for path, sharding in nnx.to_flat_state(shardings(state, family.placement(name), mesh))
    }


def check_sums(path: str | os.PathLike, config: dict | None = None, *names: str) -> None:
    """Reads every array of the named components (all, if none is named) and compares with the checksums in model.json.

    Raises one UserError that lists what differs.
    """
    folder = Path(path)
    config = config or read_config(folder)
    wrong = []
    for name in names or config["config"]:
        stored = open_stored(folder, name, config)
        for leaf in stored.leaves:
            crc, dtype = 0, stored.dtype_of(leaf)
            for index in leaf.blocks(leaf.chunk(dtype)):
                crc = checksum(stored.read(leaf, index, dtype), crc)
            if f"{crc:08x}" != config["checksums"].get(name, {}).get(leaf.path):
                wrong.append(f"{name}/{leaf.path}")
    for file, expected in config["tokenizer"].items() if not names else ():
        if not (folder / "tokenizer" / file).is_file() or file_sum(folder / "tokenizer" / file) != expected:
            wrong.append(f"tokenizer/{file}")
    if wrong:
        raise UserError(
            f"{folder}: changed since conversion (checksums differ): {listing(wrong)}; convert the model again"
        )


def file_sum(file: Path) -> str:
    """CRC-32 of a small file, as model.json writes it."""
    return f"{zlib.crc32(file.read_bytes()):08x}"
