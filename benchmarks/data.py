"""Preparing and loading data beside what bounds them: the decoder alone, and a bare read of the same bytes.

    python benchmarks/data.py [--clips 24 --pictures 200 --records 64 --repeats 3 --folder DIR --json FILE]

Clips are of 1280x720 at 30 fps, H.264, and become 49 frames of 480x720 at 8 fps; pictures are PNGs of 1024x1024 and
become 480x720, with four crops of themselves as references. Records are as large as CogVideoX-5B's in bfloat16. The
encoders are stand-ins of its shapes that cost next to nothing, so that what is measured is everything but the model;
one row has a real model, the small world's, on its own sizes. What is compared takes turns. Space for a few GB is
needed while it runs; all of it is removed.

Of the same files: "decode" is PyAV or Pillow and nothing else, as far into a clip as its frames lie; "read" is
`samples.read`, which finds the bucket, chooses, scales and crops frames, and cuts the references; "prepare" is all but
the model, records and page included. Each in as many threads as there are cores.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import av
import numpy as np
from PIL import Image

from sdv_jax.checkpoints.model_folder import about
from sdv_jax.data import encoding, importers, prepare, records, samples, settings
from sdv_jax.data.encoding import Encoders
from sdv_jax.data.latents import LatentDataset
from sdv_jax.data.video import write_video
from sdv_jax.models.contract import LatentScale
from sdv_jax.small_world.pool import clip_pool
from sdv_jax.small_world.world import World

ROOT = Path(__file__).resolve().parent.parent
SMALL_WORLD = ROOT / "models" / "small-world-cogvideox"
GEOMETRY = dict(spatial=8, temporal=4, patch=2, channels=16, height=480, width=720, num_frames=49)
TEXT = (226, 4096)
FPS = 8
SECONDS = (GEOMETRY["num_frames"] - 1) / FPS  # where the last frame of a clip lies


def main() -> None:
    """Parses the command line, runs, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="of the set of clips")
    parser.add_argument("--pictures", type=int, default=200, help="of the set of pictures")
    parser.add_argument("--records", type=int, default=64, help="to load")
    parser.add_argument("--repeats", type=int, default=3, help="turns of what is compared")
    parser.add_argument("--folder", type=Path, help="where to write; absent: the system's temporary folder")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        report = measure(Path(name), options)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """All rates, per second: the median of the turns, and the turns."""
    clips, pictures = folder / "clips", folder / "pictures"
    write_clips(clips, options.clips)
    write_pictures(pictures, options.pictures)
    turns: dict[str, list[float]] = {}
    for turn in range(options.repeats):
        for name, source, bucket in (("clips", clips, "49x480x720"), ("pictures", pictures, "1x480x720")):
            config = _config(source, folder / f"{name}_{turn}", bucket)
            turns.setdefault(f"decode {name}", []).append(decode(source))
            turns.setdefault(f"read {name}", []).append(read(config))
            turns.setdefault(f"prepare {name}", []).append(prepare_with_stand_ins(config))
    turns["prepare small world"] = [prepare_small_world(folder, turn) for turn in range(options.repeats)]
    for name, rates in load(folder, options.records, options.repeats).items():
        turns[name] = rates
    rates = {name: statistics.median(found) for name, found in turns.items()}
    kinds = ("clips", "pictures")
    return {
        "per_second": rates,
        "read_to_decode": {kind: rates[f"read {kind}"] / rates[f"decode {kind}"] for kind in kinds},
        "prepare_to_decode": {kind: rates[f"prepare {kind}"] / rates[f"decode {kind}"] for kind in kinds},
        "load_to_bare_read": rates["load records"] / rates["bare read"],
        "load_to_array_record": rates["load records"] / rates["ArrayRecord alone"],
        "record_bytes": _record_bytes(),
        "turns": turns,
        "sizes": {name: getattr(options, name) for name in ("clips", "pictures", "records")},
        "versions": {name: version(name) for name in ("jax", "av", "pillow", "array_record", "numpy")},
        "hardware": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform()},
    }


def table(report: dict) -> str:
    """The report for people."""
    rates, megabytes = report["per_second"], report["record_bytes"] / 1e6
    shares = {
        f"{step} {kind}": f"{share:.2f} of decode {kind}"
        for step in ("read", "prepare") for kind, share in report[f"{step}_to_decode"].items()
    } | {"load records": f"{report['load_to_array_record']:.2f} of ArrayRecord alone"}  # fmt: skip
    lines = [f"{name:22} {rate:8.2f} /s   {shares.get(name, '')}".rstrip() for name, rate in rates.items()]
    return "\n".join([*lines, f"a record has {megabytes:.1f} MB"])


# MARK: what is measured


def decode(folder: Path) -> float:
    """Files per second of the decoder alone: nothing is chosen, scaled or converted."""
    return _per_second(_decoded, [file for file in sorted(folder.iterdir()) if file.suffix != ".txt"])


def read(config: settings.Config) -> float:
    """Items per second to pixels of their bucket, references included."""
    importer = importers.open_source(config.source.format, config.source.path, **config.source.options)
    return _per_second(lambda index: samples.read(importer, index, config.recipe()).key, range(len(importer)))


def prepare_with_stand_ins(config: settings.Config) -> float:
    """Items per second of the whole preparation, whose encoders cost next to nothing."""
    traits = about(SMALL_WORLD).traits
    geometry = dataclasses.replace(traits.geometry, **GEOMETRY)
    traits = dataclasses.replace(traits, geometry=geometry, text_length=TEXT[0], text_width=TEXT[1])
    model = dataclasses.replace(about(SMALL_WORLD), traits=traits)
    with (
        mock.patch.object(prepare.model_folder, "about", lambda _: model),
        mock.patch.object(encoding, "digest", lambda _: ""),
        mock.patch.object(Encoders, "load", lambda *_, **__: Encoders(_Cells(), _Letters(), traits)),
    ):
        result = prepare.prepare(config, progress=False)
    return result.encoded / result.seconds


def prepare_small_world(folder: Path, turn: int) -> float:
    """Clips per second with a real model, compilation not counted."""
    source = folder / "small_world"
    if not source.exists():
        source.mkdir()
        pool = clip_pool(World(), 0, 256)
        for i, (video, caption) in enumerate(zip(pool.video, pool.captions, strict=True)):
            write_video(source / f"{i:04d}.mp4", video, fps=FPS)
            (source / f"{i:04d}.txt").write_text(caption)
    size = "x".join(map(str, clip_pool(World(), 0, 1).video.shape[1:4]))
    config = _config(source, folder / f"small_world_{turn}", size, **{"work.clips": 16, "work.unit": 64})
    rates, run = [], prepare._Work.run

    def timed(*arguments):
        start = time.perf_counter()
        unit = run(*arguments)
        rates.append(unit.items / (time.perf_counter() - start))
        return unit

    with mock.patch.object(prepare._Work, "run", timed):
        prepare.prepare(config, progress=False)
    return statistics.median(rates[1:])


def load(folder: Path, count: int, repeats: int) -> dict[str, list[float]]:
    """Records per second in a drawn order: the same bytes from one file, ArrayRecord without parsing, this package."""
    dataset = _random_records(count)
    records.save(folder / "records", dataset)
    bucket = records.load(folder / "records").buckets[0]
    size = _record_bytes()
    with open(folder / "bare", "wb") as file:
        for i in range(count):
            file.write(b"".join(array.tobytes() for array in bucket[i].values()))
    order = np.random.default_rng(0).permutation(count).tolist()
    with open(folder / "bare", "rb", buffering=0) as file:
        number = file.fileno()
        ways: dict[str, Callable[[int], object]] = {
            "bare read": lambda i: np.frombuffer(os.pread(number, size, i * size), np.uint16),
            "ArrayRecord alone": bucket._source.__getitem__,
            "load records": bucket.__getitem__,
        }
        turns = {name: [] for name in ways}
        for _ in range(repeats):
            for name, read in ways.items():
                start = time.perf_counter()
                for i in order:
                    read(i)
                turns[name].append(count / (time.perf_counter() - start))
    return turns


def _decoded(file: Path) -> None:
    if file.suffix == ".png":
        with Image.open(file) as image:
            image.load()
        return
    with av.open(str(file)) as container:
        for frame in container.decode(video=0):
            if frame.time >= SECONDS:
                return


def _per_second(function: Callable, arguments: Sequence) -> float:
    """Calls per second, in as many threads as the preparation has."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(function, arguments):
            pass
    return len(arguments) / (time.perf_counter() - start)


# MARK: what it is measured on


def write_clips(folder: Path, count: int) -> None:
    """Panning textures, which cost about what filmed clips do; 7 s each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 120, 3)).astype(np.uint8))
        wide = np.asarray(coarse.resize((2560, 720), Image.Resampling.BICUBIC))
        grain = rng.integers(-8, 8, wide.shape)
        wide = np.clip(wide + grain, 0, 255).astype(np.uint8)
        frames = np.stack([wide[:, 5 * t : 5 * t + 1280] for t in range(210)])
        write_video(folder / f"{i:04d}.mp4", frames, fps=30, quality=23)
        (folder / f"{i:04d}.txt").write_text("a texture that moves to the left")


def write_pictures(folder: Path, count: int) -> None:
    """Smooth textures of 1024x1024."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
        coarse.resize((1024, 1024), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text("a texture")


class _Cells:
    """In place of a VAE: means over cells of 8 x 8 pixels of every fourth frame, in 16 channels."""

    def whole(self, batch_size: int) -> int:
        return batch_size

    def __call__(self, pixels: np.ndarray, *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        corners = pixels[:, ::4, ::8, ::8].astype(np.float32) / 127.5 - 1
        mean = np.concatenate([corners] * 5 + [corners[..., :1]], axis=-1)
        return mean, mean


class _Letters:
    """In place of a text encoder."""

    def __init__(self):
        self._text = np.random.default_rng(0).standard_normal(TEXT, np.float32)

    def __call__(self, captions: list[str]) -> np.ndarray:
        return np.repeat(self._text[None], len(captions), axis=0)

    def cuts(self, captions: list[str]) -> int:
        return 0


def _config(source: Path, output: Path, bucket: str, **changes) -> settings.Config:
    given = {
        "model.path": str(SMALL_WORLD), "source.format": "folder", "source.path": str(source),
        "output.path": str(output), "samples.buckets": (bucket,), "samples.fps": float(FPS), "work.unit": 64,
        "page.thumbnails": 4,
    }  # fmt: skip
    return settings.load(ROOT / "configs" / "prepare.py", given | changes)


def _random_records(count: int) -> LatentDataset:
    import ml_dtypes

    noise = np.random.default_rng(0).integers(0, 2**14, 2**22).astype(np.uint16).view(ml_dtypes.bfloat16)

    def array(*shape):
        return np.resize(noise, (count, *shape))

    target, views, text = array(13, 60, 90, 16), array(8, 60, 90, 16), array(*TEXT)
    return LatentDataset(target, target, views, views, text, text[0], ("a",) * count, LatentScale.factor(0.7))


def _record_bytes() -> int:
    return 2 * (2 * 13 * 60 * 90 * 16 + 2 * 8 * 60 * 90 * 16 + TEXT[0] * TEXT[1])


if __name__ == "__main__":
    main()
