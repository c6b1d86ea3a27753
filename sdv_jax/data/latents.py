"""Prepared data: clips or images and their reference frames as VAE moments, captions as token ids or embeddings.

On disk a dataset is one folder: `dataset.json` (latent scale, shapes, captions) and one `.npy` per
array, read by memory mapping. An image is a clip of one frame, so pairs and clips have the same form:

    mean, logvar                        [n, t, h, w, c]   what is denoised
    reference_mean, reference_logvar    [n, k, h, w, c]   k single images encoded each on its own: the frames of the
    clip, or the
                                                          views of the subject; a training step draws one of them
    text                                [n, s, e] float embeddings, or [n, s] int32 token ids
    empty_text                          [s, e] or [s]     the empty prompt, for text dropout
"""

import dataclasses
import json
import math
import reprlib
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale

MOMENTS = ("mean", "logvar", "reference_mean", "reference_logvar")
ARRAYS = (*MOMENTS, "text", "empty_text")
FORMAT_VERSION = 1
_MAKE = "make it with sdv_jax.data.latents.save"


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """Arrays as in the module's docstring; `scale` is the VAE's, and is not yet applied to the moments."""

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
        _check_scale(self.scale, self.mean.shape[-1])
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


def save(dataset: LatentDataset, folder: str | Path) -> None:
    """Writes the dataset; `dataset.json` last, so that an interrupted folder is not mistaken for a whole one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(dataset, name))
    about = {
        "format_version": FORMAT_VERSION,
        "scale": dataclasses.asdict(dataset.scale),
        "shapes": {name: list(getattr(dataset, name).shape) for name in ARRAYS},
        "captions": list(dataset.captions),
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def load(folder: str | Path) -> LatentDataset:
    """Reads what `save` wrote, arrays memory-mapped. Raises UserError when something is missing or does not fit."""
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise UserError(
            f'prepared data {folder}: no dataset.json there; {_MAKE}, or use "small_world"'
        )
    try:
        about = json.loads((folder / "dataset.json").read_text())
        if about["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"prepared data {folder}: format {about['format_version']}, expected {FORMAT_VERSION}; {_MAKE} again"
            )
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        found = {name: list(array.shape) for name, array in arrays.items()}
        if found != about["shapes"]:
            raise UserError(
                f"prepared data {folder}: arrays have shapes {found}, dataset.json says {about['shapes']}; "
                f"{_MAKE} again"
            )
        return LatentDataset(**arrays, captions=tuple(about["captions"]), scale=_scale(about))
    except UserError as error:
        raise UserError(str(error).replace("prepared data:", f"prepared data {folder}:", 1)) from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"prepared data {folder}: unreadable ({told}); {_MAKE} again") from error


def _scale(about: Mapping) -> LatentScale:
    """As written; the first prepared data hold CogVideoX's one factor."""
    if "scaling_factor" in about:
        return LatentScale.factor(about["scaling_factor"])
    found = about["scale"]
    return LatentScale(tuple(map(float, found["shift"])), tuple(map(float, found["scale"])), bool(found["sampled"]))


def _check_scale(scale: LatentScale, channels: int) -> None:
    for name, values in (("shift", scale.shift), ("scale", scale.scale)):
        finite, positive = all(map(math.isfinite, values)), name == "shift" or min(values, default=0) > 0
        if not (finite and positive) or len(values) not in (1, channels):
            raise UserError(
                f"prepared data: {name} of the latents is {reprlib.repr(values)}; expected the VAE's, one number "
                f"or one per channel ({channels})" + (", above 0" if name == "scale" else "")
            )


def _shapes(dataset: LatentDataset) -> str:
    return ", ".join(f"{name} {list(getattr(dataset, name).shape)}" for name in ARRAYS)
