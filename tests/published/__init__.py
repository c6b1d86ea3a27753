"""The published checkpoints without their weights: every config file, and the names and shapes of all tensors.

CHECKPOINT/model_index.json, CHECKPOINT/COMPONENT/{config.json, tensors.txt.gz}, and original/ for the tensors of Wan's
own release. A list that equals another checkpoint's is stored once. Each line of a list is `name<TAB>(shape)`.
"""

import ast
import functools
import gzip
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent
CHECKPOINTS = (
    "CogVideoX-2b",
    "CogVideoX-5b",
    "CogVideoX-5b-I2V",
    "CogVideoX1.5-5B",
    "Wan2.1-T2V-1.3B-Diffusers",
    "Wan2.1-T2V-14B-Diffusers",
    "Wan2.2-TI2V-5B-Diffusers",
    "Wan2.2-T2V-A14B-Diffusers",
)
ORIGINALS = (
    "Wan2.1-T2V-1.3B.transformer",
    "Wan2.x-T2V-14B.transformer",  # Wan2.1-T2V-14B and each expert of Wan2.2-T2V-A14B
    "Wan2.2-TI2V-5B.transformer",
    "Wan2.1_VAE.pth",
    "Wan2.2_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
_FIRST = {"CogVideoX": "CogVideoX-2b", "Wan": "Wan2.1-T2V-1.3B-Diffusers"}
_EQUAL = {"transformer": "Wan2.1-T2V-14B-Diffusers", "transformer_2": "Wan2.1-T2V-14B-Diffusers"}


def components(checkpoint: str) -> tuple[str, ...]:
    """The parts with weights, as its folder has them: "transformer", "vae", "text_encoder", perhaps "transformer_2"."""
    return tuple(sorted(file.parent.name for file in (FOLDER / checkpoint).glob("*/config.json")))


def tensors(checkpoint: str, component: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a component's tensors, in the order of its state dict."""
    file = FOLDER / checkpoint / component / "tensors.txt.gz"
    if not file.is_file():
        shared = component.startswith("transformer")
        name = _EQUAL[component] if shared else next(v for k, v in _FIRST.items() if checkpoint.startswith(k))
        file = FOLDER / name / component.removesuffix("_2") / "tensors.txt.gz"
    return dict(_read(file))


def original(name: str) -> dict[str, tuple[int, ...]]:
    """The same of one of `ORIGINALS`."""
    return dict(_read(FOLDER / "original" / f"{name}.tensors.txt.gz"))


def config(checkpoint: str, component: str) -> dict:
    """The config of a component, of "scheduler", or "model_index"."""
    place = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
    return json.loads((FOLDER / checkpoint / place.get(component, f"{component}/config.json")).read_text())


@functools.cache
def _read(file: pathlib.Path) -> tuple[tuple[str, tuple[int, ...]], ...]:
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    return tuple((name, ast.literal_eval(shape)) for name, shape in (line.split("\t") for line in lines))
