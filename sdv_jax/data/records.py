"""Prepared datasets on disk: clips or images and their references as VAE moments, captions as embeddings or token ids.

A dataset is one folder, each bucket (records of one size) a config of tensorflow-datasets in the ArrayRecord format:

    DIR/manifest.json         what it is; written last, so that a folder without it is not a dataset
    DIR/empty_text.npy        [s, e] or [s]     the empty prompt, for text dropout
    DIR/BUCKET/1.0.0/         dataset_info.json, features.json, train.array_record-NNNNN, one for every unit of
                              work that had a record for the bucket

so `tfds.data_source("NAME/BUCKET", data_dir=DIR.parent)["train"]` reads it too, with or without TensorFlow. A record:

    mean, logvar                        [t, h, w, c]   what is denoised; an image has t = 1
    reference_mean, reference_logvar    [k, h, w, c]   k single images: frames of the clip, or views of the subject
    text                                [s, e] floats, stored without the zero rows at its end, or [s] int32 token ids
    caption, key, provenance            text, the last one JSON

Records are not compressed: it would save a fifth of the disk, and reading would take twice as long.

tensorflow-datasets is imported with this module and never later: while it is imported it replaces Python's own import
(etils' lazy imports), and what other threads import meanwhile, as Pillow does to decode, fails.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import dataset_info, naming
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from sdv_jax.data import manifest as manifests
from sdv_jax.data.files import make_folder, replacing
from sdv_jax.data.latents import LatentDataset
from sdv_jax.data.manifest import AGAIN, BucketEntry, Feature, Manifest, Shard
from sdv_jax.errors import UserError, one_line
from sdv_jax.models.contract import LatentScale

MOMENTS = ("mean", "logvar", "reference_mean", "reference_logvar")
ARRAYS = (*MOMENTS, "text")
TEXTS = ("caption", "key", "provenance")
VERSION = "1.0.0"  # tensorflow-datasets' version of the contents; ours of the layout is in the manifest
SPLIT = "train"
_TEMPLATE = "{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_METADATA = ("dataset_info.json", "features.json")
_DIGITS = 5  # of a shard's number, as tensorflow-datasets writes it


# MARK: reading


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Random access to the records of one size; picklable, safe to read from several threads.

    Attributes:
      size: frames, height and width in pixels; of arrays that `save` took from memory, in latents.
      features: shape and dtype of every array of a record, text at its full length.
    """

    folder: Path
    name: str
    size: tuple[int, int, int]
    features: Mapping[str, Feature]
    shards: tuple[Shard, ...]
    units: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: feature.shape for name, feature in self.features.items()}

    @property
    def has_token_ids(self) -> bool:
        """Whether `text` holds token ids, which a training step encodes, instead of embeddings."""
        return len(self.features["text"].shape) == 1

    def __len__(self) -> int:
        return sum(shard.records for shard in self.shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a record, as stored; read-only where no padding was put back. UserError for a damaged one."""
        try:
            stored = self._stored(index)
            return {name: _array(stored[name].bytes_list.value[0], self.features[name]) for name in ARRAYS}
        except (ValueError, IndexError) as error:
            raise self._damaged(index, error) from error

    def describe(self, index: int) -> dict[str, Any]:
        """{"key", "caption", "provenance"} of a record. UserError for a damaged one."""
        try:
            stored = self._stored(index)
            told = {name: stored[name].bytes_list.value[0].decode("utf-8") for name in TEXTS}
            return told | {"provenance": json.loads(told["provenance"])}
        except (ValueError, IndexError) as error:
            raise self._damaged(index, error) from error

    def _stored(self, index: int) -> Mapping:
        if not 0 <= index < len(self):
            raise KeyError(f"record {index} of {len(self)}")
        try:
            return tf_example_pb2.Example.FromString(self._source[index]).features.feature
        except Exception as error:  # whatever the readers of ArrayRecord and protobuf raise for damaged bytes
            raise self._damaged(index, error) from error

    def _damaged(self, index: int, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        ends = itertools.accumulate(shard.records for shard in self.shards)
        shard = next(shard for shard, end in zip(self.shards, ends, strict=True) if index < end)
        where = f"prepared data {self.folder}: bucket {self.name}, record {index}"
        path = _shard_path(self.folder, self.name, shard, self.units)
        return UserError(f"{where} is damaged, in {path} ({one_line(error, typed=True)}); {AGAIN}")

    @functools.cached_property
    def _source(self):
        return _source_of(self.folder, self.name, self.shards, self.units)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A whole file of known length, in the words of array_record's FileInstruction: opening it can wait."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared dataset. `scale` is the VAE's, and is not yet applied to the moments; `about` is the manifest's."""

    folder: Path
    scale: LatentScale
    empty_text: np.ndarray
    buckets: tuple[Bucket, ...]
    about: Mapping[str, Any]
    fingerprint: str

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


def load(folder: str | Path) -> Prepared:
    """Opens a prepared dataset; records are read when they are asked for.

    Raises UserError when it is missing or not complete, when a file is missing, cut, changed or of another version, or
    when what the manifest says does not fit together.
    """
    folder = Path(folder)
    found = manifests.read(folder)
    empty_text = _read_empty_text(folder, found)
    buckets = tuple(
        Bucket(folder, name, entry.size, entry.features, entry.shards, found.units)
        for name, entry in sorted(found.buckets.items())
    )
    if not sum(map(len, buckets)):
        raise UserError(f"prepared data {folder}: it holds no record; {AGAIN}")
    for bucket in buckets:
        where = f"prepared data {folder}: bucket {bucket.name}"
        _check_features(where, bucket.features, found.scale, empty_text)
        _check_files(where, folder / bucket.name / VERSION, found.buckets[bucket.name], found.units)
    return Prepared(folder, found.scale, empty_text, buckets, found.about, found.fingerprint)


def _array(raw: bytes, feature: Feature) -> np.ndarray:
    flat = np.frombuffer(raw, feature.dtype)
    if flat.size == np.prod(feature.shape, dtype=int):
        return flat.reshape(feature.shape)
    if len(feature.shape) != 2:
        raise ValueError(f"{flat.size} numbers for shape {feature.shape}")
    rows = flat.reshape(-1, feature.shape[1])
    whole = np.zeros(feature.shape, feature.dtype)
    whole[: len(rows)] = rows  # raises ValueError where they are more
    return whole


def _read_empty_text(folder: Path, found: Manifest) -> np.ndarray:
    path = folder / "empty_text.npy"
    if (there := empty_text_sum(folder)) != found.empty_text:
        told = "is missing" if there is None else "is damaged (its checksum differs)"
        raise UserError(f"prepared data {folder}: {path.name} {told}; {AGAIN}")
    stored = np.load(path)  # bfloat16 is stored as the bytes it is
    dtypes = {entry.features["text"].dtype for entry in found.buckets.values()}
    return stored.view(dtypes.pop()) if len(dtypes) == 1 else stored


def _check_features(where: str, features: Mapping[str, Feature], scale: LatentScale, empty_text: np.ndarray) -> None:
    if set(features) != set(ARRAYS):
        raise UserError(f"{where}: expected arrays {', '.join(ARRAYS)}, found {', '.join(features)}; {AGAIN}")
    shapes = {name: feature.shape for name, feature in features.items()}
    told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    if any(len(shapes[name]) != 4 or min(shapes[name]) < 1 for name in MOMENTS):
        raise UserError(f"{where}: moments have four axes, none of them empty; found {told}")
    if shapes["mean"] != shapes["logvar"] or shapes["reference_mean"] != shapes["reference_logvar"]:
        raise UserError(f"{where}: means and log-variances differ in shape ({told})")
    if shapes["mean"][1:] != shapes["reference_mean"][1:]:
        raise UserError(f"{where}: references and targets differ in height, width or channels ({told})")
    if shapes["text"] != empty_text.shape or len(shapes["text"]) not in (1, 2):
        raise UserError(f"{where}: text and empty_text differ in shape ({told}, empty_text {list(empty_text.shape)})")
    manifests.check_scale(scale, shapes["mean"][-1], where)


def _check_files(where: str, place: Path, entry: BucketEntry, units: int) -> None:
    for name in _METADATA:
        if not (place / name).is_file():
            raise UserError(f"{where}: {name} is missing in {place}; {AGAIN}")
        if hashlib.sha256((place / name).read_bytes()).hexdigest() != entry.metadata.get(name):
            raise UserError(f"{where}: {place / name} is damaged (its checksum differs); {AGAIN}")
    for shard in entry.shards:
        path = place / _shard_name(shard.unit, units)
        if not path.is_file():
            raise UserError(f"{where}: {path} is missing; {AGAIN}")
        if (found := path.stat().st_size) != shard.bytes:
            raise UserError(f"{where}: {path} has {found} bytes, expected {shard.bytes}; {AGAIN}")


# MARK: writing


class ShardWriter:
    """Writes the records of one unit of work for one bucket; a context manager whose file appears when it ends well.

    Args:
      features: shape and dtype of every array of a record.
      unit, units: which unit of work, of how many.

    Raises UserError where the disk is full or takes no files.
    """

    def __init__(self, folder: Path, name: str, features: Mapping[str, Feature], *, unit: int, units: int):
        self._unit, self._features = unit, features
        self._path = make_folder(folder / name / VERSION, what="bucket") / _shard_name(unit, units)
        self._stack = contextlib.ExitStack()
        self._temporary = self._stack.enter_context(replacing(self._path, what="records"))
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        self._sum, self._count = hashlib.sha256(), 0

    def write(self, arrays: Mapping[str, np.ndarray], *, key: str, caption: str, provenance: Mapping) -> None:
        """Adds one record; arrays are rounded to the dtypes of the bucket. UserError for what is not finite then."""
        with np.errstate(over="ignore"):
            record = {name: np.asarray(arrays[name], feature.dtype) for name, feature in self._features.items()}
        for name, array in record.items():
            if not np.isfinite(array).all():
                words = "that float16 cannot hold; set output.dtype to bfloat16"
                if array.dtype != np.float16 or not np.isfinite(np.asarray(arrays[name], np.float32)).all():
                    words = "that are NaN or infinite: the model is damaged, or model.dtype too coarse for it"
                raise UserError(f"record {key}: {name} holds values {words}")
        record["text"] = _without_padding(record["text"])
        told = json.dumps(dict(provenance), ensure_ascii=False, sort_keys=True)
        raw = _serialised(record, {"key": key, "caption": caption, "provenance": told})
        self._sum.update(raw)
        self._count += 1
        try:
            self._writer.write(raw)
        except RuntimeError as error:
            raise self._refused(error) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """The records appear, or where there was an error, nothing does."""
        try:
            self._writer.close()
        except RuntimeError as cause:
            if kind is None:
                kind, error = UserError, self._refused(cause)
                self._stack.__exit__(kind, error, None)
                raise error from cause
        self._stack.__exit__(kind, error, trace)

    def shard(self) -> Shard:
        """What was written, once the writer has ended."""
        return Shard(self._unit, self._count, self._path.stat().st_size, self._sum.hexdigest())

    def _refused(self, error: RuntimeError) -> UserError:
        told = one_line(error, typed=True)
        return UserError(f"records {self._path} cannot be written ({told}); free the disk and go on")


def forget(folder: Path, unit: int, units: int) -> None:
    """Removes what an interrupted run left of a unit's records, whole files and begun ones."""
    name = _shard_name(unit, units)
    suffix = name.removeprefix(SPLIT)
    for place in folder.glob(f"*/{VERSION}"):
        for path in (*place.glob(f".writing.*{suffix}"), place / name):
            path.unlink(missing_ok=True)


def is_there(folder: Path, name: str, shard: Shard, units: int) -> bool:
    """Whether a shard's file is there, in its length."""
    path = _shard_path(folder, name, shard, units)
    return path.is_file() and path.stat().st_size == shard.bytes


def is_whole(folder: Path, name: str, shard: Shard, units: int) -> bool:
    """Whether a shard's records are what was written; reads all of them."""
    if not is_there(folder, name, shard, units):
        return False
    found, source = hashlib.sha256(), _source_of(folder, name, [shard], units)
    try:
        for index in range(shard.records):
            found.update(source[index])
    except Exception:  # whatever ArrayRecord raises for damaged bytes
        return False
    return found.hexdigest() == shard.sha256


def empty_text_sum(folder: Path) -> str | None:
    """SHA-256 of DIR/empty_text.npy; None where it is not there."""
    path = folder / "empty_text.npy"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def write_empty_text(folder: Path, empty_text: np.ndarray) -> None:
    """Writes DIR/empty_text.npy; numpy has no bfloat16, whose bytes are stored as uint16."""
    with replacing(folder / "empty_text.npy", what="empty prompt") as temporary, open(temporary, "wb") as file:
        np.save(file, empty_text.view(np.uint16) if empty_text.dtype.name == "bfloat16" else empty_text)


def finish(
    folder: Path,
    buckets: Mapping[str, tuple[tuple[int, int, int], Mapping[str, Feature], Sequence[Shard]]],
    *,
    scale: LatentScale,
    units: int,
    about: Mapping[str, Any],
) -> Manifest:
    """Writes the metadata of every bucket, {name: (size, features, shards)}, and last the manifest.

    The shards and empty_text.npy are there already. Doing it twice, or twice at once, leaves the same files.
    """
    entries = {}
    for name, (size, features, shards) in buckets.items():
        shards = tuple(sorted(shards, key=lambda shard: shard.unit))
        sums = _write_metadata(folder, name, features, shards, units)
        entries[name] = BucketEntry(tuple(size), dict(features), shards, sums)
    made = Manifest(scale, empty_text_sum(folder), units, entries, dict(about))
    manifests.write(folder, made)
    return made


def save(folder: str | Path, dataset: LatentDataset) -> None:
    """Arrays in memory as a prepared dataset of one bucket, named after their latent frames, height and width."""
    folder = make_folder(folder, what="prepared data")
    (folder / manifests.FILE).unlink(missing_ok=True)
    size = dataset.mean.shape[1:4]
    name = "x".join(map(str, size))
    features = {
        array: Feature(getattr(dataset, array).shape[1:], getattr(dataset, array).dtype.name) for array in ARRAYS
    }
    with ShardWriter(folder, name, features, unit=0, units=1) as writer:
        for i, caption in enumerate(dataset.captions):
            arrays = {array: getattr(dataset, array)[i] for array in ARRAYS}
            writer.write(arrays, key=f"{i:06d}", caption=caption, provenance={})
    write_empty_text(folder, np.asarray(dataset.empty_text))
    finish(folder, {name: (size, features, [writer.shard()])}, scale=dataset.scale, units=1, about={})


def _without_padding(text: np.ndarray) -> np.ndarray:
    """Embeddings without the rows at the end whose every bit is zero; token ids as they are."""
    if text.ndim == 1:
        return text
    text = np.ascontiguousarray(text)
    used = np.flatnonzero(text.view(np.uint8).any(axis=1))
    return text[: used[-1] + 1 if used.size else 0]


def _serialised(arrays: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> bytes:
    """A tf.train.Example as the features of `_tfds_features` parse it, and the same bytes for the same content."""
    raw = {name: array.tobytes() for name, array in arrays.items()}
    raw |= {name: text.encode("utf-8") for name, text in texts.items()}
    stored = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value])) for name, value in raw.items()
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=stored))
    return example.SerializeToString(deterministic=True)


def _source_of(folder: Path, name: str, shards: Sequence[Shard], units: int) -> ArrayRecordDataSource:
    return ArrayRecordDataSource(
        [_Part(str(_shard_path(folder, name, shard, units)), 0, shard.records, shard.records) for shard in shards]
    )


def _shard_path(folder: Path, name: str, shard: Shard, units: int) -> Path:
    return folder / name / VERSION / _shard_name(shard.unit, units)


def _shard_name(unit: int, units: int) -> str:
    return f"{SPLIT}.array_record-{unit:0{max(_DIGITS, len(str(units)))}d}"


def _tfds_features(features: Mapping[str, Feature]):
    arrays = {
        name: tfds.features.Tensor(
            shape=(None, *f.shape[1:]) if name == "text" and len(f.shape) == 2 else f.shape,
            dtype=np.dtype(f.dtype), encoding="bytes",
        )
        for name, f in features.items()
    }  # fmt: skip
    return tfds.features.FeaturesDict(arrays | {name: tfds.features.Text() for name in TEXTS})


def _write_metadata(
    folder: Path, name: str, features: Mapping[str, Feature], shards: Sequence[Shard], units: int
) -> dict[str, str]:
    """Writes dataset_info.json and features.json of a bucket; returns their SHA-256."""
    place = folder / name / VERSION
    by_unit = {shard.unit: shard for shard in shards}
    # A length of zero says that the file of that number does not exist.
    lengths = [by_unit[unit].records if unit in by_unit else 0 for unit in range(units)]
    own_name = re.sub(r"\W", "_", folder.resolve().name)
    template = naming.ShardedFileTemplate(
        data_dir=place, template=_TEMPLATE, dataset_name=own_name, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT, shard_lengths=lengths, num_bytes=sum(s.bytes for s in shards), filename_template=template
    )
    identity = dataset_info.DatasetIdentity(
        name=own_name, version=tfds.core.Version(VERSION), data_dir=str(place), module_name="", config_name=name
    )
    info = dataset_info.DatasetInfo(builder=identity, features=_tfds_features(features))
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    sums = {}
    with tempfile.TemporaryDirectory() as written:
        info.write_to_directory(written)
        for file in _METADATA:
            raw = (Path(written) / file).read_bytes()
            sums[file] = hashlib.sha256(raw).hexdigest()
            with replacing(place / file, what="metadata") as temporary:
                temporary.write_bytes(raw)
    return sums
