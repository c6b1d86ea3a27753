"""Adapters added into a model's weights: a pipeline folder that computes the adapted model's numbers by itself.

The model is never whole in memory. Its tensors pass through as in an export, and those that an adapter changes get
their update, block of rows by block of rows, on the way.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdv_jax.checkpoints import adapter_files, convert, diffusers_folder, model_folder
from sdv_jax.checkpoints.adapter_files import Fitted
from sdv_jax.checkpoints.adapter_reading import Module, finite
from sdv_jax.checkpoints.model_folder import MODEL_FILE, About
from sdv_jax.checkpoints.packing import all_finite
from sdv_jax.checkpoints.safetensors_io import BLOCK_BYTES, SHARD_BYTES, Output, Tensor, rows_of
from sdv_jax.checkpoints.staging import check_absent
from sdv_jax.errors import UserError

_STEP_BYTES = BLOCK_BYTES // 4  # of weights that are held in float32, beside their update, at once


def merge(
    model: str | os.PathLike,
    out: str | os.PathLike,
    adapters: Sequence[str | os.PathLike] = (),
    adapters_2: Sequence[str | os.PathLike] = (),
    *,
    alpha: float | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes `model` (a converted or a diffusers folder) as the diffusers folder `out`, with `adapters` added.

    W + Σ alpha / rank · B A is computed in float32 and rounded once to the dtype that W has; all other tensors keep
    their bits. It is what `lora.merge` makes in memory. Where references stood in training goes into defaults.json if
    the family would put them elsewhere.

    Args:
      adapters: what `adapter_files.load` takes; the updates of several are summed.
      adapters_2: the same for the second expert of a model of two.
      alpha: for files that do not state one.

    Raises:
      UserError: one line, for a model or an adapter that is damaged, an adapter that does not fit or that acts on one
        stream only, and an `out` that cannot be written. `out` then does not exist.
    """
    folder = Path(model)
    check_absent(Path(out))  # told before anything is read
    about = model_folder.about(folder)
    fitted = {}
    for name, paths in (("transformer", adapters), ("transformer_2", adapters_2)):
        if paths and name not in about.configs:
            raise UserError(f"{paths[0]}: given for the second expert, and this model has one; give it for the first")
        fitted[name] = [_fit(about, name, path, alpha) for path in paths]
    outputs = _outputs_of(folder, about)
    for name, found in fitted.items():
        outputs |= {name: _changed(outputs[name], found)} if found else {}
    config = about.raw | {"defaults": _defaults(about, [each for found in fitted.values() for each in found])}
    tokenizer = diffusers_folder.tokenizer(folder)
    convert.write_pipeline(out, config, outputs, tokenizer=tokenizer, shard_bytes=shard_bytes, progress=progress)


# MARK: the adapters


def _fit(about: About, name: str, path: str | os.PathLike, alpha: float | None) -> Fitted:
    """The adapter beside denoiser `name`, read once from end to end."""
    fitted = adapter_files.fit(about.family.components[name].abstract(about.configs[name], dtype=np.float32), path,
                               alpha=alpha)
    if fitted.partly_for_references:
        raise UserError(
            f"{fitted.contents.file}: its adaLN layers act on reference tokens only (adaln_lora 'reference'), and a "
            "merged weight would act on all tokens; load it as an adapter"
        )
    for module in fitted.contents.modules.values():  # NaN is told now, not after gigabytes are written
        finite(module.a)
        finite(module.b)
    return fitted


def _defaults(about: About, fitted: Sequence[Fitted]) -> dict:
    """The model's defaults.json, with the place of references that the adapters were trained with."""
    options, kept = about.family.options, dict(about.raw["defaults"])
    before = kept.pop("reference", None)
    reference = adapter_files.agreed({each.contents.file: each.contents.info for each in fitted}, "reference") or before
    usual = options("all", reference) == options("all", None)
    return kept if usual else kept | {"reference": dict(reference)}


# MARK: the weights


def _outputs_of(folder: Path, about: About) -> dict[str, list[Output]]:
    """The model's torch tensors by component, as they are."""
    if (folder / MODEL_FILE).is_file():
        return convert.stored_outputs(folder, about.raw)
    outputs, errors = {}, []
    for name, raw in about.raw["config"].items():
        try:
            source = diffusers_folder.open_component(folder, about.family, name, raw)
            source.check_tied()
        except UserError as error:
            errors.append(str(error))
            continue
        tensors = [each for known, tensor in source.tensors.items() for each in source.tied.get(known, (tensor,))]
        outputs[name] = [Output(each.name, each.dtype, each.shape, _Intact(each)) for each in tensors]
    diffusers_folder.raise_all(errors)
    return outputs


@dataclass(frozen=True)
class _Intact:
    """The blocks of one tensor of a diffusers folder."""

    tensor: Tensor

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.tensor.blocks():
            if not all_finite(block):
                where = f"{self.tensor.file}: tensor {self.tensor.name}"
                raise UserError(f"{where} holds NaN or infinite values; the checkpoint is damaged")
            yield block


def _changed(outputs: Sequence[Output], fitted: Sequence[Fitted]) -> list[Output]:
    updates: dict[str, list[Module]] = {}
    for each in fitted:
        for name, module in each.weights.items():
            updates.setdefault(name, []).append(module)
    return [replace(o, blocks=_Sum(o, updates[o.name])) if o.name in updates else o for o in outputs]


@dataclass(frozen=True)
class _Sum:
    """The blocks of one torch weight [out, ...] with its updates added."""

    output: Output
    modules: Sequence[Module]

    def __iter__(self) -> Iterator[np.ndarray]:
        (a, b), start = _factors(self.modules), 0
        for block in self.output.blocks:
            for rows in rows_of(block, _STEP_BYTES):
                update = (b[start : start + len(rows)] @ a).reshape(rows.shape)
                with np.errstate(over="ignore"):  # told below, in words
                    merged = (rows.astype(np.promote_types(rows.dtype, np.float32)) + update).astype(rows.dtype)
                if not all_finite(merged):
                    told = f"merging {self.output.name}: the sum does not fit into {rows.dtype}"
                    raise UserError(f"{told}; convert the model with --dtype float32 or bfloat16 first")
                yield merged
                start += len(rows)


def _factors(modules: Sequence[Module]) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) [r, in] and [out, r] in float32 whose product is the sum of the updates; r is the sum of the ranks."""
    halves = [(finite(module.a), finite(module.b) * np.float32(module.scale)) for module in modules]
    down = np.concatenate([a.reshape(len(a), -1) for a, _ in halves])
    return down, np.concatenate([b.reshape(len(b), -1) for _, b in halves], axis=1)
