"""Prepared data in memory: clips or images and their references as VAE moments, captions as embeddings or token ids.

What `records.save` writes, and tests train on. An image is a clip of one frame, so pairs and clips have the same form:

    mean, logvar                        [n, t, h, w, c]   what is denoised
    reference_mean, reference_logvar    [n, k, h, w, c]   k single images encoded each on its own: the frames of the
                                                          clip, or views of the subject; a training step draws one
    text                                [n, s, e] float embeddings, or [n, s] int32 token ids
    empty_text                          [s, e] or [s]     the empty prompt, for text dropout
"""

import dataclasses
import json
import zlib

import numpy as np

from sdv_jax.data.manifest import check_scale
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale

MOMENTS = ("mean", "logvar", "reference_mean", "reference_logvar")
ARRAYS = (*MOMENTS, "text", "empty_text")


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """Arrays as in the module's docstring; `scale` is the VAE's, and is not yet applied to the moments.

    A dataset of one bucket, which is itself; see `loading.Dataset` and `loading.Rows`.
    """

    mean: np.ndarray
    logvar: np.ndarray
    reference_mean: np.ndarray
    reference_logvar: np.ndarray
    text: np.ndarray
    empty_text: np.ndarray
    captions: tuple[str, ...]
    scale: LatentScale

    def __post_init__(self):
        ranks = {"text": (2, 3), "empty_text": (1, 2)} | dict.fromkeys(MOMENTS, (5,))
        if any(getattr(self, name).ndim not in ranks[name] or 0 in getattr(self, name).shape[1:] for name in ARRAYS):
            raise UserError(
                f"prepared data: moments have five axes, text two or three, none of them empty; found {_shapes(self)}"
            )
        check_scale(self.scale, self.mean.shape[-1], "prepared data")
        n = len(self.captions)
        sizes = {name: len(getattr(self, name)) for name in (*MOMENTS, "text")}
        if n == 0 or set(sizes.values()) != {n}:
            raise UserError(
                f"prepared data: expected one row per caption in every array, found {n} captions and rows {sizes}"
            )
        if self.mean.shape != self.logvar.shape or self.reference_mean.shape != self.reference_logvar.shape:
            raise UserError(f"prepared data: means and log-variances differ in shape ({_shapes(self)})")
        if self.mean.shape[2:] != self.reference_mean.shape[2:]:
            raise UserError(
                f"prepared data: references and targets differ in height, width or channels ({_shapes(self)})"
            )
        if self.text.shape[1:] != self.empty_text.shape:
            raise UserError(f"prepared data: empty_text must have the shape of one row of text ({_shapes(self)})")

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def buckets(self) -> tuple["LatentDataset", ...]:
        return (self,)

    @property
    def name(self) -> str:
        return "x".join(map(str, self.mean.shape[1:4]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of one example."""
        return {name: getattr(self, name).shape[1:] for name in (*MOMENTS, "text")}

    @property
    def fingerprint(self) -> str:
        """Changes with the captions, the shapes or the first example."""
        about = json.dumps([self.captions, _shapes(self)]).encode()
        return f"{zlib.crc32(np.ascontiguousarray(self.mean[0]).tobytes(), zlib.crc32(about)):08x}"

    @property
    def has_token_ids(self) -> bool:
        """Whether `text` holds token ids, which a training step encodes, instead of embeddings."""
        return self.text.ndim == 2

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row of every per-example array."""
        return {name: getattr(self, name)[index] for name in (*MOMENTS, "text")}

    def describe(self, index: int) -> dict[str, str]:
        """Which example that row is."""
        return {"key": str(index), "caption": self.captions[index]}


def _shapes(dataset: LatentDataset) -> str:
    return ", ".join(f"{name} {list(getattr(dataset, name).shape)}" for name in ARRAYS)
