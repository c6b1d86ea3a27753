"""A model in memory as a diffusers pipeline folder: what training from nothing leaves behind."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from sdv_jax.checkpoints.diffusers_folder import DEFAULTS_FILE
from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of
from sdv_jax.checkpoints.family import Family
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
    index: Mapping = {},
    defaults: Mapping = {},
) -> None:
    """Writes the new folder `out`, which diffusers loads as the family's first pipeline class.

    `modules` and `configs` are keyed by component; a config is the content of its config.json, absent where that is the
    module's own config as diffusers writes it. `scheduler` is the content of scheduler_config.json, `tokenizer` a
    folder to copy, `index` further keys of model_index.json, `defaults` the content of defaults.json. Raises UserError
    where `out` exists.
    """
    outputs = {name: _outputs(module, family.components[name].rules(module.config)) for name, module in modules.items()}
    index = {
        "_class_name": family.pipelines[0],
        "_diffusers_version": _DIFFUSERS,
        "tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **index,
    }
    with staged(Path(out), needed=sum(o.nbytes for found in outputs.values() for o in found)) as partial:
        for name, module in modules.items():
            component = family.components[name]
            (partial / name).mkdir()
            write_folder(partial / name, component.stem, outputs[name])
            own = configs.get(name) or _diffusers_config(component.torch_class, module.config)
            write_json(partial / name / "config.json", own)
            index[name] = ["transformers" if name == "text_encoder" else "diffusers", component.torch_class]
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", scheduler)
        shutil.copytree(tokenizer, partial / "tokenizer")
        write_json(partial / "model_index.json", index)
        if defaults:
            write_json(partial / DEFAULTS_FILE, defaults)


def _diffusers_config(class_name: str, config) -> dict:
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
