"""A model in memory as a diffusers pipeline folder: what training from nothing leaves behind."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of
from sdv_jax.checkpoints.families import Family
from sdv_jax.checkpoints.safetensors_io import Output, rows_of, write_folder, write_json
from sdv_jax.checkpoints.staging import staged
from sdv_jax.sharding import dotted

_DIFFUSERS = "0.31.0"  # the version whose config files ours equal in keys


def save_pipeline(
    out: str | os.PathLike,
    family: Family,
    modules: Mapping[str, nnx.Module],
    configs: Mapping[str, Mapping],
    *,
    scheduler: Mapping,
    tokenizer: str | os.PathLike,
) -> None:
    """Writes the new folder `out`, which diffusers loads as `family.pipeline`.

    `modules` and `configs` are keyed by component; a config is the content of its config.json (see `diffusers_config`).
    `scheduler` is the content of scheduler_config.json, `tokenizer` a folder to copy. Raises UserError where `out`
    exists.
    """
    outputs = {
        name: _outputs(modules[name], component.rules(modules[name].config))
        for name, component in family.components.items()
    }
    index = {
        "_class_name": family.pipeline,
        "_diffusers_version": _DIFFUSERS,
        "tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    with staged(Path(out), needed=sum(o.nbytes for found in outputs.values() for o in found)) as partial:
        for name, component in family.components.items():
            (partial / name).mkdir()
            write_folder(partial / name, component.stem, outputs[name])
            write_json(partial / name / "config.json", configs[name])
            library = "transformers" if name == "text_encoder" else "diffusers"
            index[name] = [library, component.torch_class]
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
        shutil.copytree(tokenizer, partial / "tokenizer")
        write_json(partial / "model_index.json", index)


def diffusers_config(class_name: str, config) -> dict:
    """A config dataclass whose fields are diffusers' keys, as diffusers writes it."""
    return {"_class_name": class_name, "_diffusers_version": _DIFFUSERS, **dataclasses.asdict(config)}


def _outputs(module: nnx.Module, rules) -> list[Output]:
    state = nnx.state(module, nnx.Param)
    values = {dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
    found = []
    for leaf in leaves_of(leaf_shapes(state), rules):
        value = values[leaf.path]
        for layer, name in enumerate(leaf.names):
            tensor = np.ascontiguousarray(leaf.rule.transform.to_torch(value[layer] if leaf.rule.stacked else value))
            found.append(Output(name, tensor.dtype, tensor.shape, list(rows_of(tensor))))
    return found
