"""Sets of a few clips and pictures, some of which cannot be used; encoders that need no compiling."""

import time
from pathlib import Path

import numpy as np
from PIL import Image

from sdv_jax.data import settings
from sdv_jax.data.encoding import Encoders
from tests.data import clips

FPS = 8
COLOURS = ("red", "green", "blue")


def moving(seed, frames, *, height=32, width=48):
    """A patch on noise that moves: every frame differs from the others."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 120, (1, height, width, 3)), frames, axis=0).astype(np.uint8)
    for t in range(frames):
        left = (3 * t) % (width - 12)
        video[t, 8:20, left : left + 12] = rng.integers(150, 255, 3)
    return video


def make(folder: Path, *, good: int = 6, bad: int = 0) -> Path:
    """`good` clips of 9 or 13 frames at 8 fps, `bad` files that are no videos, each with a caption beside it."""
    folder.mkdir(parents=True)
    for i in range(good):
        clips.write(folder / f"clip{i:02d}.mp4", moving(i, 9 if i % 2 else 13), fps=FPS)
        (folder / f"clip{i:02d}.txt").write_text(f"a {COLOURS[i % 3]} ball on sand")
    for i in range(bad):
        (folder / f"nothing{i:02d}.mp4").write_bytes(b"this is no video" * 10)
        (folder / f"nothing{i:02d}.txt").write_text("a cat")
    return folder


def make_pairs(folder: Path, *, good: int = 4) -> Path:
    """Folders of two pictures of one subject, a.png and b.png, the second one with other colours."""
    for i in range(good):
        subject = folder / f"subject{i:02d}"
        subject.mkdir(parents=True)
        frame = moving(i, 1, height=40, width=64)[0]
        for view, pixels in (("a", frame), ("b", 255 - frame)):
            Image.fromarray(pixels).save(subject / f"{view}.png")
        (subject / "caption.txt").write_text("a red ball")
    return folder


class FakeVideo:
    """In place of a VAE: latents are means over 4 × 4 pixels of every fourth frame."""

    def __init__(self, seconds=0.0):
        self.seconds, self.calls = seconds, []

    def whole(self, batch_size):
        return batch_size

    def __call__(self, pixels, *, batch_size):
        time.sleep(self.seconds)
        self.calls.append((pixels.shape, batch_size))
        n, _, h, w, _ = pixels.shape
        cells = pixels[:, ::4].astype(np.float32).reshape(n, -1, h // 4, 4, w // 4, 4, 3).mean(axis=(3, 5))
        mean = np.concatenate([cells, cells[..., :1]], axis=-1) / 255
        return mean, -mean


class FakeText:
    """In place of a text encoder: letters as numbers, rows of zeros behind them."""

    def __init__(self, length, width):
        self.shape = (length, width)

    def __call__(self, captions):
        found = np.zeros((len(captions), *self.shape), np.float32)
        for row, caption in zip(found, captions, strict=True):
            for i, letter in enumerate(caption[: self.shape[0]]):
                row[i] = ord(letter)
        return found

    def cuts(self, captions):
        return sum(len(caption) > self.shape[0] for caption in captions)


def fake_encoders(traits, seconds=0.0):
    """Encoders that need no compiling, of the tiny CogVideoX of tests/tiny_pipeline.py."""
    return Encoders(FakeVideo(seconds), FakeText(traits.text_length, traits.text_width), traits)


def config(model, source, output, **changes):
    """A preparation of `make`'s set; changes are SECTION__KEY=VALUE."""
    given = {
        "model.path": str(model), "source.format": "folder", "source.path": str(source), "output.path": str(output),
        "samples.buckets": ("9x32x48",), "samples.fps": float(FPS), "samples.frames": 3, "work.unit": 2,
        "work.workers": 2, "output.dtype": "float32", "model.text_dtype": "float32", "rejected.most": 0.5,
        "rejected.judged_after": 4, "page.thumbnails": 4,
    }  # fmt: skip
    return settings.load("configs/prepare.py", given | {key.replace("__", "."): new for key, new in changes.items()})
