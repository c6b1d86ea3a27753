"""The files that the rows of docs/errors.md name, and what it takes to run a row."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import struct

import numpy as np
from PIL import Image

from sdv_jax.data import latents, locks, prepare, records, settings
from sdv_jax.models.contract import LatentScale
from sdv_jax.train import config as configs
from tests import tiny_wan
from tests.data import clips
from tests.data.pictures import png_claiming
from tests.tiny_pipeline import save_pipeline
from tests.train import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
BASE = 'sample --model model --prompt "a red ball" --num-frames 1 --steps 1 --quiet --out video.mp4'
_held = contextlib.ExitStack()  # until the tests end
_ROW = re.compile(r"\| `(?P<input>.+?)` \| `(?P<line>.+?)` \|(?P<remark>.*)\|")


def rows() -> list[tuple[str, str]]:
    """(input, line) of every row of the page."""
    found = filter(None, map(_ROW.fullmatch, PAGE.read_text().splitlines()))
    return [(m["input"], m["line"].replace("\\|", "|")) for m in found]


def arguments(typed: str) -> list[str]:
    """What a row types, as the arguments of `sdv`."""
    return shlex.split(typed)[1:] if typed.split()[0] == "sdv" else shlex.split(f"{BASE} {typed}")


def make_files(folder: pathlib.Path) -> None:
    """Fills `folder` with everything that the rows mention."""
    _pictures(folder)
    _models(folder)
    _wan(folder)
    _adapters(folder)
    _data(folder)
    _runs(folder)
    _preparations(folder)


def _pictures(folder: pathlib.Path) -> None:
    (folder / "pictures").mkdir()
    (folder / "text.png").write_text("this is not an image")
    (folder / "empty.png").touch()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for name in ("cut.png", "cut.jpg"):
        Image.fromarray(noise).save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:800])
    (folder / "bomb.png").write_bytes(png_claiming(60000, 60000))
    Image.fromarray(noise[:1, :1]).save(folder / "one_pixel.png")
    Image.fromarray(noise).convert("L").save(folder / "grey.png")
    Image.fromarray(noise).convert("P").save(folder / "palette.png")
    Image.fromarray(noise).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "sixteen_bits.png")
    Image.fromarray(np.dstack([noise, noise[..., 0]])).save(folder / "alpha.png")
    Image.fromarray(np.resize(noise, (20, 400, 3))).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(noise).save(folder / "animated.gif", save_all=True, append_images=[Image.fromarray(noise[::-1])])


def _models(folder: pathlib.Path) -> None:
    from sdv_jax.checkpoints.convert import convert

    model = save_pipeline(folder / "model")
    weights = "diffusion_pytorch_model.safetensors"
    convert(model, folder / "half_converted", progress=False)
    shutil.rmtree(folder / "half_converted" / "vae")

    def copy(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(model, folder / name))

    cut = copy("cut_weights") / "transformer" / weights
    cut.write_bytes(cut.read_bytes()[:-1000])
    (copy("no_weights") / "vae" / weights).unlink()
    (copy("broken_json") / "transformer" / "config.json").write_text("not json")
    shutil.rmtree(copy("no_tokenizer") / "tokenizer")
    holes = copy("nan_weights") / "vae" / weights
    content = bytearray(holes.read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    holes.write_bytes(content)
    _edit(copy("unknown_class") / "model_index.json", _class_name="MochiPipeline")
    _edit(copy("unknown_scheduler") / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    (copy("bad_defaults") / "defaults.json").write_text('{"hight": 480}')


def _wan(folder: pathlib.Path) -> None:
    """An image-to-video model, copies of it as one of two experts, and what is left of an original release."""
    model = tiny_wan.save_pipeline(folder / "wan")
    _edit(model / "defaults.json", width=64)
    for name in ("experts", "lost_expert"):
        copy = pathlib.Path(shutil.copytree(model, folder / name))
        experts = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
        _edit(copy / "model_index.json", **experts, expand_timesteps=False)
    shutil.copytree(folder / "experts" / "transformer", folder / "experts" / "transformer_2")
    (folder / "release").mkdir()
    (folder / "release" / "Wan2.1_VAE.pth").write_text("not a VAE")


def _edit(file: pathlib.Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _adapters(folder: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    def adapter(name: str, width: int, block: int) -> None:
        module = f"transformer.transformer_blocks.{block}.attn1.to_q"
        halves = {"lora_A": np.ones((2, width), np.float32), "lora_B": np.ones((width, 2), np.float32)}
        save_file({f"{module}.{half}.weight": value for half, value in halves.items()}, folder / name)

    adapter("fits.safetensors", 32, 1)
    adapter("wider.safetensors", 64, 0)
    adapter("deeper.safetensors", 32, 7)
    adaln = {
        f"transformer.transformer_blocks.{block}.norm1.linear.lora_{half}.weight": np.ones(shape, np.float32)
        for block in range(2)
        for half, shape in (("A", (2, 8)), ("B", (192, 2)))
    }
    save_file(adaln, folder / "one_stream.safetensors", metadata={"sdv_jax.adaln_lora": "reference"})
    save_file({"unet.conv_in.weight": np.ones((2, 2), np.float32)}, folder / "strange.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "fits.safetensors").read_bytes()[:-100])


def _data(folder: pathlib.Path) -> None:
    """Prepared data for `model`, and for others."""
    for name, frames, changes in (
        ("pairs", 1, {}),
        ("clips", 3, {}),
        ("other_channels", 3, {"channels": 6}),
        ("odd", 3, {"height": 5}),
        ("longer_text", 3, {"tokens": 20}),
        ("other_scale", 3, {"scale": 0.9}),
    ):
        records.save(folder / name, _dataset(frames, **changes))


def _dataset(frames: int, *, height=4, channels=4, tokens=12, scale=0.7) -> latents.LatentDataset:
    moments = {
        name: np.zeros((4, frames, height, 6, channels), np.float32)
        for name in ("mean", "logvar", "reference_mean", "reference_logvar")
    }
    text = np.zeros((4, tokens, 16), np.float32)
    return dataclasses.replace(
        tiny.dataset(4, frames=1, views=1), **moments, text=text, empty_text=text[0], scale=LatentScale.factor(scale)
    )


def _runs(folder: pathlib.Path) -> None:
    """Configurations, an empty workdir, those of a run of five steps and of one in stages, one with a run at work."""
    shutil.copy(ROOT / "configs" / "base.py", folder / "base.py")
    (folder / "tiny.py").write_text(_CONFIG)
    (folder / "run").mkdir()
    (folder / "started" / "checkpoints" / "5").mkdir(parents=True)
    (folder / "started" / "config.json").write_text(configs.load(folder / "tiny.py").json())
    (folder / "staged").mkdir()
    staged = configs.load(folder / "tiny.py", {"switch.order": "stages"})
    (folder / "staged" / "config.json").write_text(staged.json())
    (folder / "busy").mkdir()
    _held.enter_context(locks.whole(folder / "busy", key="--workdir"))
    (folder / "odd_records").mkdir()
    norms = {"norm_identity": 1.0, "norm_motion": 1.0}
    record = {"step": 0, "cosine": None} | norms | {"groups": {"block 0": {"cosine": 0.0}}}
    (folder / "odd_records" / "gradients.jsonl").write_text(json.dumps(record) + "\n")


def _preparations(folder: pathlib.Path) -> None:
    """A folder of one clip, and one that is being made of it."""
    shutil.copy(ROOT / "configs" / "prepare.py", folder / "prepare.py")
    (folder / "videos.py").write_text(_PREPARATION)
    (folder / "videos").mkdir()
    clips.write(folder / "videos" / "a.mp4", clips.numbered(9), fps=8)
    (folder / "videos" / "a.txt").write_text("a red ball")
    with contextlib.chdir(folder):
        prepare._open(settings.load("videos.py", {"output.path": "begun"}))


_PREPARATION = """
from configs import prepare

def get_config():
    config = prepare.get_config()
    config.model.path, config.output.path = "model", "made"
    config.source.format, config.source.path = "folder", "videos"
    config.samples.buckets, config.samples.fps = ("9x16x24",), 8.0
    return config
"""
_CONFIG = """
from configs import base

def get_config():
    config = base.get_config()
    config.model.path, config.data.identity, config.data.motion = "model", "pairs", "clips"
    return config
"""
