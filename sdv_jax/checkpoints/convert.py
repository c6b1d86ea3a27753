"""From a published model's folder to ours, and on to a diffusers pipeline, one tensor at a time."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from sdv_jax.checkpoints import arrays, diffusers_folder, model_folder, original_wan
from sdv_jax.checkpoints.engine import Leaf, Source
from sdv_jax.checkpoints.model_folder import MODEL_FILE, Stored, file_sum
from sdv_jax.checkpoints.rules.table import SAME
from sdv_jax.checkpoints.safetensors_io import CODES, DTYPES, SHARD_BYTES, Output, rows_of, write_folder, write_json
from sdv_jax.checkpoints.staging import staged
from sdv_jax.errors import UserError
from sdv_jax.progress import Progress

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    dtype: str | None = None,
    verify: bool = False,
    progress: bool = True,
) -> None:
    """Converts `src` into the new folder `dst`.

    `src` is a diffusers pipeline or an original release of Wan, a folder of either kind or a Hugging Face id.

    Args:
      dtype: "float32" or "bfloat16" (but for the few tensors that the family keeps exact, as diffusers does); absent,
        every tensor keeps the dtype it has.
      verify: run both models on random inputs before `dst` appears (see `verify.py`); needs torch and diffusers.
      progress: show bars on stderr.

    Raises:
      UserError: one line, for anything that does not fit exactly. `dst` then does not exist.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype: unknown value {dtype!r}; known: {', '.join(_DTYPES)}")
    if verify:
        from sdv_jax.checkpoints import verify as verification

        verification.require_torch()
    folder = diffusers_folder.locate(src)
    layout = original_wan if original_wan.recognises(folder) else diffusers_folder
    config = layout.read_config(folder) | {"source": str(src)}
    family = model_folder.understood(config, folder).family
    sources, errors = {}, []
    for name in config["config"]:
        try:
            sources[name] = layout.open_component(folder, family, name, config["config"][name])
        except UserError as error:
            errors.append(str(error))
    diffusers_folder.raise_all(errors)
    kinds = {
        name: {
            leaf.path: family.components[name].dtype_of(leaf.path, _DTYPES[dtype]) if dtype else source.dtype_of(leaf)
            for leaf in source.leaves
        }
        for name, source in sources.items()
    }
    needed = sum(
        int(np.prod(leaf.shape)) * kinds[name][leaf.path].itemsize
        for name, source in sources.items()
        for leaf in source.leaves
    )
    bars = Progress(shown=progress)
    with staged(Path(dst), needed=needed) as partial:
        sums = {}
        for name, source in sources.items():
            source.check_tied()
            with bars.stage(name, total=len(source.leaves)) as advance:
                sums[name] = _write_arrays(partial / name, source, kinds[name], advance)
        shutil.copytree(layout.tokenizer(folder), partial / "tokenizer")
        write_json(partial / MODEL_FILE, _describe(config, sources, kinds, sums, partial / "tokenizer", cast=dtype))
        if verify:
            verification.verify(folder, partial)


def _write_arrays(folder: Path, source: Source, kinds: dict[str, np.dtype], advance) -> dict[str, str]:
    def streamed(leaf: Leaf) -> arrays.Streamed:
        kind = kinds[leaf.path]
        return arrays.Streamed(leaf.shape, kind, leaf.chunk(kind), lambda: source.blocks(leaf, kind))

    sums = arrays.save(folder, {leaf.path: streamed(leaf) for leaf in source.leaves}, done=advance)
    return {path: f"{crc:08x}" for path, crc in sorted(sums.items())}


def _describe(
    config: dict, sources: dict[str, Source], kinds: dict, sums: dict, tokenizer: Path, *, cast: str | None
) -> dict:
    """model.json. `tied` and `tensor_dtypes` hold what export could not know otherwise; mostly they are empty."""
    raw = {name: dict(values) for name, values in config["config"].items()}
    tied, narrow = {}, {}
    for name, source in sources.items():
        tied[name] = {first: [tensor.name for tensor in tensors] for first, tensors in source.tied.items()}
        narrow[name] = (
            {}
            if cast
            else {
                tensor: CODES[source.tensors[tensor].dtype]
                for leaf in source.leaves
                for tensor in leaf.names
                if source.tensors[tensor].dtype != kinds[name][leaf.path]
            }
        )
        for key in ("dtype", "torch_dtype"):  # transformers notes here what it loads by default
            if cast and key in raw[name]:
                raw[name][key] = cast
    return {
        **config,
        "config": raw,
        "dtype": {name: "+".join(sorted({kind.name for kind in found.values()})) for name, found in kinds.items()},
        "tied": tied,
        "tensor_dtypes": narrow,
        "tokenizer": {str(f.relative_to(tokenizer)): file_sum(f) for f in sorted(tokenizer.rglob("*")) if f.is_file()},
        "checksums": sums,
    }


# ---------------------------------------------------------------- back


def export(
    model: str | os.PathLike, out: str | os.PathLike, *, shard_bytes: int = SHARD_BYTES, progress: bool = True
) -> None:
    """Writes the converted folder `model` as the diffusers pipeline folder `out`, tensors bit-equal to those that came
    in.

    Weights beyond `shard_bytes` are split into files with an index, as diffusers does. Raises UserError if `model` is
    not an intact converted folder or `out` cannot be written; `out` then does not exist.
    """
    folder = Path(model)
    config = model_folder.read_config(folder)
    if not (folder / MODEL_FILE).is_file():
        raise UserError(f"{model}: is a diffusers pipeline folder already; expected a converted model")
    outputs = stored_outputs(folder, config)
    write_pipeline(out, config, outputs, tokenizer=folder / "tokenizer", shard_bytes=shard_bytes, progress=progress)


def stored_outputs(folder: Path, config: dict) -> dict[str, list[Output]]:
    """The torch tensors of every component of a converted folder, read when their turn comes."""
    stored = {name: model_folder.open_stored(folder, name, config) for name in config["config"]}
    return {name: _outputs(part, config["tensor_dtypes"][name], config["tied"][name]) for name, part in stored.items()}


def write_pipeline(
    out: str | os.PathLike,
    config: dict,
    outputs: Mapping[str, Sequence[Output]],
    *,
    tokenizer: Path,
    shard_bytes: int,
    progress: bool,
) -> None:
    """Writes the diffusers pipeline folder `out`: `config` as `model_folder.read_config` has it, and these tensors."""
    family, bars = model_folder.family_of(config, Path(out)), Progress(shown=progress)
    with staged(Path(out), needed=sum(o.nbytes for found in outputs.values() for o in found)) as partial:
        for name, found in outputs.items():
            (partial / name).mkdir()
            with bars.stage(name, total=len(found)) as advance:
                counted = [Output(o.name, o.dtype, o.shape, _counted(o.blocks, advance)) for o in found]
                write_folder(partial / name, family.components[name].stem, counted, shard_bytes=shard_bytes)
            write_json(partial / name / "config.json", config["config"][name])
        (partial / "scheduler").mkdir()
        write_json(partial / "scheduler" / "scheduler_config.json", config["scheduler"])
        shutil.copytree(tokenizer, partial / "tokenizer")
        write_json(partial / "model_index.json", config["model_index"])
        if config["defaults"]:
            write_json(partial / diffusers_folder.DEFAULTS_FILE, config["defaults"])


def _outputs(stored: Stored, narrow: dict[str, str], tied: dict[str, list[str]]) -> list[Output]:
    outputs = []
    for leaf in stored.leaves:
        for layer, name in enumerate(leaf.names):
            dtype = DTYPES[narrow[name]] if name in narrow else stored.dtype_of(leaf)
            outputs += [
                Output(written, dtype, leaf.tensor_shape, _Layer(stored, leaf, layer, dtype))
                for written in tied.get(name, [name])
            ]
    return outputs


class _Layer:
    """The bytes of one torch tensor, read from the converted folder when iterated."""

    def __init__(self, stored: Stored, leaf: Leaf, layer: int, dtype: np.dtype):
        self._take = stored, leaf, layer, dtype

    def __iter__(self) -> Iterator[np.ndarray]:
        stored, leaf, layer, dtype = self._take
        if leaf.rule.stacked:
            index = slice(layer, layer + 1), *(slice(0, n) for n in leaf.shape[1:])
            yield from rows_of(leaf.rule.transform.to_torch(stored.read(leaf, index, dtype)[0]))
        elif leaf.rule.transform is SAME:  # as a table of embeddings, the largest tensor there is
            for index in leaf.blocks(leaf.chunk(dtype)):
                yield stored.read(leaf, index, dtype)
        else:
            index = tuple(slice(0, n) for n in leaf.shape)
            yield from rows_of(leaf.rule.transform.to_torch(stored.read(leaf, index, dtype)))


def _counted(blocks, advance) -> Iterator[np.ndarray]:
    yield from blocks
    advance()
