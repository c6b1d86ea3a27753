"""Small sets without preparation: an example is decoded and encoded when it is first read, and kept in memory.

The set is described as for `sdv prepare`, and gives the same numbers as its records would in float32. Every item is
decoded once at the start, which finds its bucket and whether it can be used.
"""

import dataclasses
import hashlib
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from sdv_jax.data import importers, samples, settings
from sdv_jax.data.decode import Size
from sdv_jax.data.encoding import Encoders
from sdv_jax.data.images import silence_pillow
from sdv_jax.data.importers.item import Importer, Rejected
from sdv_jax.data.samples import Recipe, bucket_name
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale

SUFFIX = ".py"  # what the name of a raw set ends in: it is the file that describes it


@dataclasses.dataclass
class RawRows:
    """The items of one size; see `loading.Rows`. Not for other processes: the encoders are on this one's device."""

    importer: Importer
    recipe: Recipe
    size: Size
    items: tuple[int, ...]
    encoders: Encoders
    shapes: Mapping[str, tuple[int, ...]]
    has_token_ids: bool

    def __post_init__(self):
        self.name, self.known, self.lock = bucket_name(self.size), {}, threading.Lock()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        with self.lock:
            if index not in self.known:
                self.known[index] = self._encoded(self.items[index])
            return self.known[index]

    def describe(self, index: int) -> dict[str, str]:
        item = self.importer[self.items[index]]
        return {"key": item.key, "caption": item.caption}

    def _encoded(self, item: int) -> dict[str, np.ndarray]:
        try:
            sample = samples.read(self.importer, item, self.recipe)
        except Rejected as error:
            key = self.importer.key(item)
            raise UserError(f"raw data: item {key} could be read when the run began, and now not: {error}") from error
        mean, logvar = self.encoders.video(sample.target[None], batch_size=1)
        views = self.encoders.video(sample.references[:, None], batch_size=1)
        text = np.asarray(self.encoders.text([sample.caption]))[0]
        return {
            "mean": mean[0], "logvar": logvar[0], "reference_mean": views[0][:, 0], "reference_logvar": views[1][:, 0],
            "text": text,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RawSet:
    """See `loading.Dataset`."""

    scale: LatentScale
    empty_text: np.ndarray
    buckets: tuple[RawRows, ...]
    fingerprint: str


def load(file: str | Path, *, model: str, embed: bool) -> RawSet:
    """The set that the preparation config `file` describes, for the model folder `model`.

    `embed`: captions as embeddings, else as token ids. Items that cannot be used are told on stderr. Raises UserError
    as preparing does, and when more than `rejected.most` of the items cannot be used, or none can.
    """
    silence_pillow()
    config = settings.load(file, {"model.path": model, "output.path": "raw"})
    importer = importers.open_source(config.source.format, Path(config.source.path), **config.source.options)
    device = jax.local_devices()[:1]
    encoders = Encoders.load(
        model, dtype=config.model.dtype, text_dtype=config.model.text_dtype, embed=embed, devices=device
    )
    recipe, found, sum_ = config.recipe(), {}, hashlib.sha256(repr(config.decides()).encode())
    rejected, left_out = Counter(), Counter()
    settings.check_sizes(recipe.buckets, encoders.traits.geometry)
    keys: set[str] = set()
    for item in tqdm(range(len(importer)), desc=f"looking at {config.source.path}", unit="item"):
        try:
            sample = samples.read(importer, item, recipe)
            if sample.key in keys:
                raise Rejected("duplicate key", sample.key)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        keys.add(sample.key)
        left_out.update(reason for reason, _ in sample.left_out)
        sum_.update(f"{sample.key}\n{sample.caption}\n".encode())
        found.setdefault(sample.size, []).append(item)
    _judge(config, rejected, left_out, len(importer))
    empty_text = np.asarray(encoders.text([""]))[0]
    buckets = tuple(
        RawRows(importer, recipe, size, tuple(items), encoders, _shapes(recipe, size, encoders, empty_text), not embed)
        for size, items in found.items()
    )
    return RawSet(encoders.traits.latents, empty_text, buckets, sum_.hexdigest()[:16])


def _judge(config: settings.Config, rejected: Counter, left_out: Counter, count: int) -> None:
    total, where = rejected.total(), f"raw data {config.source.path}"
    told = _told(rejected)
    if total == count or total > config.rejected.most * count:
        raise UserError(
            f"{where}: {total} of {count} items cannot be used ({told or 'there is none'}); mend the set, or raise "
            f"rejected.most, now {config.rejected.most}"
        )
    if total:
        print(f"sdv: {where}: {total} of {count} items are left out: {told}", file=sys.stderr)
    if left_out:
        print(f"sdv: {where}: {left_out.total()} references are left out: {_told(left_out)}", file=sys.stderr)


def _told(reasons: Counter) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())


def _shapes(recipe: Recipe, size: Size, encoders: Encoders, empty_text: np.ndarray) -> dict[str, tuple[int, ...]]:
    mean = encoders.traits.geometry.latent_shape(size.frames, size.height, size.width)
    views = (recipe.count(size), *mean[1:])
    moments = {"mean": mean, "logvar": mean, "reference_mean": views, "reference_logvar": views}
    return moments | {"text": empty_text.shape}
