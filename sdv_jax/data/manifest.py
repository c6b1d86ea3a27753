"""What a prepared dataset says of itself, manifest.json: checked as it is read, written last."""

import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives numpy the name bfloat16
import numpy as np

from sdv_jax.data.files import replacing
from sdv_jax.errors import UserError, one_line
from sdv_jax.models.contract import LatentScale

FILE = "manifest.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16", "int32")
AGAIN = "prepare it again"


@dataclasses.dataclass(frozen=True)
class Feature:
    """One array of a record: its shape as read, and its dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """The records that one unit of work put into one bucket: how many, their SHA-256, and the size of their file."""

    unit: int
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class BucketEntry:
    """One bucket: frames, height and width in pixels, what a record holds, its shards by unit, its metadata's sums."""

    size: tuple[int, int, int]
    features: Mapping[str, Feature]
    shards: tuple[Shard, ...]
    metadata: Mapping[str, str]

    def __len__(self) -> int:
        return sum(shard.records for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`units` is the number of units of work, which the names of shard files count; `about` is for people and logs."""

    scale: LatentScale
    empty_text: str
    units: int
    buckets: Mapping[str, BucketEntry]
    about: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Of all records, the scale and the empty prompt: another one when any of them changes."""
        content = {
            name: [dataclasses.asdict(entry)["features"], [shard.sha256 for shard in entry.shards]]
            for name, entry in sorted(self.buckets.items())
        }
        told = json.dumps([dataclasses.asdict(self.scale), self.empty_text, content], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def write(folder: Path, manifest: Manifest) -> None:
    """Writes DIR/manifest.json, whole or not at all."""
    told = {
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "records": sum(map(len, manifest.buckets.values())),
        **dataclasses.asdict(manifest),
    }
    write_json(folder / FILE, told, what="manifest", indent=1)


def read(folder: Path) -> Manifest:
    """The manifest of a prepared dataset. Raises UserError when it is missing, unreadable or of another version."""
    if not folder.is_dir():
        raise UserError(f"prepared data {folder}: no such folder; make it with sdv prepare")
    if not (folder / FILE).is_file():
        raise UserError(f"prepared data {folder}: no {FILE} there, so it is not complete; {_missing(folder)}")
    try:
        told = json.loads((folder / FILE).read_text("utf-8"))
        if told["format_version"] != FORMAT_VERSION:
            found = reprlib.repr(told["format_version"])
            raise UserError(f"prepared data {folder}: format {found}, expected {FORMAT_VERSION}; {AGAIN}")
        buckets = {str(name): _bucket(entry) for name, entry in told["buckets"].items()}
        found = Manifest(_scale(told["scale"]), str(told["empty_text"]), int(told["units"]), buckets, told["about"])
        if found.fingerprint != told["fingerprint"]:
            raise UserError(f"prepared data {folder}: {FILE} was changed (its fingerprint differs); {AGAIN}")
        return found
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        told = one_line(error, typed=True)
        raise UserError(f"prepared data {folder}: {FILE} is unreadable ({told}); {AGAIN}") from error


def write_json(path: Path, content: Any, *, what: str, indent: int | None = None) -> None:
    """A JSON file, whole or not at all."""
    with replacing(path, what=what) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False), "utf-8")


def check_scale(scale: LatentScale, channels: int, where: str) -> None:
    """Raises UserError unless there are one or `channels` finite numbers for each of shift and scale, scale > 0."""
    for name, values in (("shift", scale.shift), ("scale", scale.scale)):
        finite, positive = all(map(math.isfinite, values)), name == "shift" or min(values, default=0) > 0
        if not (finite and positive) or len(values) not in (1, channels):
            raise UserError(
                f"{where}: {name} of the latents is {reprlib.repr(values)}; expected the VAE's, one number "
                f"or one per channel ({channels})" + (", above 0" if name == "scale" else "")
            )


def _missing(folder: Path) -> str:
    if (folder / "dataset.json").is_file():
        return "it is of an earlier version: prepare it again"
    if (folder / "shards").is_dir():
        return "run the same sdv prepare again to finish it"
    return "make it with sdv prepare"


def _bucket(told: Mapping) -> BucketEntry:
    features = {name: Feature(tuple(map(int, f["shape"])), _dtype(f["dtype"])) for name, f in told["features"].items()}
    shards = tuple(
        Shard(int(s["unit"]), int(s["records"]), int(s["bytes"]), str(s["sha256"])) for s in told["shards"]
    )
    frames, height, width = map(int, told["size"])
    return BucketEntry((frames, height, width), features, shards, dict(told["metadata"]))


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"dtype {reprlib.repr(name)}, expected one of {', '.join(DTYPES)}")
    return np.dtype(name).name


def _scale(told: Mapping) -> LatentScale:
    return LatentScale(tuple(map(float, told["shift"])), tuple(map(float, told["scale"])), bool(told["sampled"]))
