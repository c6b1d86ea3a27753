"""Conversion of a model of real size: memory it grows by, and its rate beside that of a plain copy of the same bytes.

    python benchmarks/convert.py [--layers 30 --repeats 3 --folder DIR --json FILE]

The model is random: the transformer of Wan2.2-TI2V-5B with all its names and shapes in bfloat16, in shards as published
(10 GB; fewer layers make it smaller), and a tiny VAE and text encoder. Conversion and copy take turns. Each starts with
none of the source in the page cache and ends when everything is on the disk. Space for two and a half times the model
is needed while it runs; all of it is removed.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

CONVERT = """
import sys, time
from sdv_jax.checkpoints.convert import convert

def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before, start, cpu = peak(), time.perf_counter(), time.process_time()
convert(sys.argv[1], sys.argv[2], progress=False)
print(time.perf_counter() - start, time.process_time() - cpu, peak() - before, before)
"""
NOISE = 2**25  # random numbers that all tensors are filled from
SHARD_BYTES = 5 * 10**9


def main() -> None:
    """Parses the command line, runs, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="of the transformer, each 330 MB")
    parser.add_argument("--repeats", type=int, default=3, help="turns of conversion and copy")
    parser.add_argument("--folder", type=Path, help="where to write; absent: the system's temporary folder")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        report = measure(Path(name), options)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Writes the model, converts and copies it in turns; seconds and bytes."""
    size, largest = write_model(folder / "source", options.layers)
    turns = {"convert": [], "copy": [], "convert_cpu": [], "growth_bytes": []}
    for _ in range(options.repeats):
        _forget(folder / "source")
        start = time.perf_counter()
        _copy(folder / "source", folder / "copy")
        turns["copy"].append(time.perf_counter() - start)
        shutil.rmtree(folder / "copy")
        _forget(folder / "source")
        command = [sys.executable, "-c", CONVERT, str(folder / "source"), str(folder / "model")]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, cpu, growth, imports = map(float, run.stdout.split())
        turns["convert"].append(seconds)
        turns["convert_cpu"].append(cpu)
        turns["growth_bytes"].append(int(growth))
        shutil.rmtree(folder / "model")
    rates = {name: size / statistics.median(turns[name]) / 1e6 for name in ("convert", "copy")}
    return {
        "bytes": size,
        "largest_tensor_bytes": largest,
        "megabytes_per_second": rates,
        "convert_to_copy": rates["convert"] / rates["copy"],
        "peak_growth_bytes": max(turns["growth_bytes"]),
        "imports_bytes": int(imports),
        "turns": turns,
        "layers": options.layers,
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore", "numpy")},
        "hardware": {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform()},
    }


def table(report: dict) -> str:
    """The report for people."""
    rates, turns = report["megabytes_per_second"], report["turns"]
    growth, imports = report["peak_growth_bytes"] / 1e6, report["imports_bytes"] / 1e6
    return "\n".join(
        [
            f"{report['bytes'] / 1e9:.1f} GB, largest tensor {report['largest_tensor_bytes'] / 1e6:.0f} MB",
            f"convert  {rates['convert']:6.0f} MB/s, {report['convert_to_copy']:.2f} of the copy's rate; "
            f"{statistics.median(turns['convert_cpu']):.0f} s of processor time",
            f"copy     {rates['copy']:6.0f} MB/s",
            f"memory   {growth:6.0f} MB above {imports:.0f} of imports",
        ]
    )


def write_model(folder: Path, layers: int) -> tuple[int, int]:
    """Writes the pipeline folder; returns (bytes of all tensors, bytes of the largest)."""
    import ml_dtypes
    import numpy as np

    from sdv_jax.checkpoints.safetensors_io import Output, write_folder, write_json
    from sdv_jax.models.wan import VARIANTS
    from sdv_jax.models.wan.family import FAMILY
    from sdv_jax.small_world import build_tokenizer

    published = VARIANTS["Wan2.2-TI2V-5B"]
    configs = {
        "transformer": dataclasses.replace(published.transformer, num_layers=layers),
        "vae": dataclasses.replace(published.vae, base_dim=4, decoder_base_dim=4),
        "text_encoder": dataclasses.replace(
            published.text_encoder, vocab_size=256, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4
        ),
    }
    noise = np.random.default_rng(0).standard_normal(NOISE, np.float32).astype(ml_dtypes.bfloat16)
    sizes = []
    for name, config in configs.items():
        component = FAMILY.components[name]
        (folder / name).mkdir(parents=True)
        raw = dataclasses.asdict(config) | {"_class_name": component.torch_class}
        if name == "text_encoder":
            raw = dataclasses.asdict(config) | {"architectures": [component.torch_class], "model_type": "umt5"}
        write_json(folder / name / "config.json", raw)
        outputs = [
            Output(tensor, noise.dtype, leaf.tensor_shape, _Noise(noise, leaf.tensor_shape))
            for leaf in component.leaves(config)
            for tensor in leaf.names
        ]
        write_folder(folder / name, component.stem, outputs, shard_bytes=SHARD_BYTES)
        sizes += [output.nbytes for output in outputs]
    build_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"} | scheduler)
    parts = {name: ["diffusers", FAMILY.components[name].torch_class] for name in configs}
    parts |= {"scheduler": ["diffusers", "UniPCMultistepScheduler"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", "expand_timesteps": True} | parts)
    return sum(sizes), max(sizes)


class _Noise:
    """Blocks of numbers that make up a tensor of that shape; made when iterated."""

    def __init__(self, noise, shape: tuple[int, ...]):
        self._noise, self._shape = noise, shape

    def __iter__(self) -> Iterator:
        left = 1
        for length in self._shape:
            left *= length
        while left:
            yield self._noise[:left]
            left -= min(left, len(self._noise))


def _copy(source: Path, destination: Path) -> None:
    """File by file; like the conversion it syncs once, at the end."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            place = destination / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    os.sync()


def _forget(folder: Path) -> None:
    """Takes the files of `folder` out of the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
