"""What `configs/prepare.py` holds, as frozen dataclasses; what each key means stands there beside its default."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdv_jax.config_files import Reader, check_choices, check_rules, value
from sdv_jax.data.decode import Size
from sdv_jax.data.samples import REFERENCES, WINDOWS, Recipe
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Geometry

# Which model it is, its files say.
HOW = (
    "model.path", "output.path", "work.workers", "work.clips", "work.pictures", "work.captions", "rejected.most",
    "rejected.judged_after", "page.thumbnails", "page.frames", "page.height",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
    path: str
    dtype: str
    text_dtype: str


@dataclasses.dataclass(frozen=True)
class Source:
    format: str
    path: str
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Output:
    path: str
    dtype: str
    text: str


@dataclasses.dataclass(frozen=True)
class Samples:
    buckets: tuple[str, ...]
    fps: float
    references: str
    frames: int
    crops: int
    jitter: float
    seed: int
    window: str


@dataclasses.dataclass(frozen=True)
class Work:
    unit: int
    workers: int
    clips: int
    pictures: int
    captions: int


@dataclasses.dataclass(frozen=True)
class RejectedItems:
    most: float
    judged_after: int


@dataclasses.dataclass(frozen=True)
class Page:
    thumbnails: int
    frames: int
    height: int


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model
    source: Source
    output: Output
    samples: Samples
    work: Work
    rejected: RejectedItems
    page: Page

    def __post_init__(self):
        for key, example in _NEEDED.items():
            if not value(self, key):
                raise UserError(f"config key {key!r} is empty: this preparation needs it, for example {example}")
        check_choices(self, CHOICES)
        check_rules(self, [
            (("rejected.most",), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
            (("samples.jitter",), lambda x: 0 <= x < 1, "a number from 0 to below 1"),
            (_POSITIVE, lambda x: x > 0, "a number above 0"),
            (_NOT_NEGATIVE, lambda x: x >= 0, "0 or more"),
        ])  # fmt: skip
        _check_name(self.output.path)
        sizes(self.samples.buckets)

    def recipe(self) -> Recipe:
        """How samples are made."""
        s = self.samples
        return Recipe(sizes(s.buckets), s.fps or None, s.references, s.frames, s.crops, s.jitter, s.seed, s.window)

    def flat(self) -> dict[str, Any]:
        """All settings by dotted key."""
        sections = dataclasses.asdict(self).items()
        return {f"{section}.{name}": found for section, values in sections for name, found in values.items()}

    def decides(self) -> dict[str, Any]:
        """The settings that decide what is in the records; the others may change in a begun folder."""
        return {key: found for key, found in self.flat().items() if key not in HOW}


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.text_dtype": ("float32", "bfloat16"),
    "output.dtype": ("float32", "bfloat16", "float16"),
    "output.text": ("embeddings", "token_ids"),
    "samples.references": REFERENCES,
    "samples.window": WINDOWS,
}
_NEEDED = {
    "model.path": "models/CogVideoX-5b",
    "source.format": "folder",
    "source.path": "my_clips",
    "output.path": "data/my_clips",
    "samples.buckets": "('49x480x720',)",
}
_POSITIVE = ("samples.crops", "work.unit", "work.clips", "work.pictures", "work.captions", "page.frames", "page.height")
_NOT_NEGATIVE = (
    "samples.fps", "samples.frames", "samples.seed", "work.workers", "rejected.judged_after", "page.thumbnails",
)  # fmt: skip


def load(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """The preparation that a Python file describes, as `config_files.Reader.load` says."""
    return Reader(Config, base="configs/prepare.py").load(path, overrides)


def sizes(buckets: Sequence[str]) -> tuple[Size, ...]:
    """("49x480x720",) -> sizes of frames, height, width. Raises UserError."""
    found = []
    for told in buckets:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", told)
        if not match or Size(*map(int, match.groups())) in found:
            why = "is there twice" if match else "is not understood"
            raise UserError(
                f"config key 'samples.buckets': {told!r} {why}; expected FRAMESxHEIGHTxWIDTH, such as '49x480x720'"
            )
        found.append(Size(*map(int, match.groups())))
    return tuple(found)


def check_sizes(buckets: Sequence[Size], geometry: Geometry) -> None:
    """Raises UserError for a bucket that the model cannot take: its cells, patches and frames must come out even."""
    side = geometry.spatial * geometry.patch
    for size in buckets:
        told = f"config key 'samples.buckets': {size.frames}x{size.height}x{size.width}"
        if size.height % side or size.width % side:
            raise UserError(f"{told}: height and width must be multiples of {side} for this model")
        if (size.frames - 1) % geometry.temporal:
            raise UserError(f"{told}: frames must be 1 + a multiple of {geometry.temporal} for this model")
        latents = geometry.latent_shape(size.frames, size.height, size.width)[0]
        if latents % geometry.frame_patch:
            raise UserError(
                f"{told}: {latents} latent frames, expected a multiple of {geometry.frame_patch} for this model; "
                f"take {size.frames + geometry.temporal * geometry.surplus(latents)} frames"
            )


def _check_name(path: str) -> None:
    name = Path(path).absolute().name
    if not re.fullmatch(r"[a-zA-Z]\w*", name, re.ASCII):
        raise UserError(
            f"config key 'output.path': the folder is named {name!r}, which is the dataset's name as well; expected a "
            "letter and then letters, digits and _"
        )
