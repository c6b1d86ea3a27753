"""The base models of the small world, from nothing: autoencoder, data, text-to-video training, diffusers folder.

    python -m sdv_jax.small_world.base --config configs/small_world_base.py --workdir runs/base \\
        --out models/small-world-cogvideox
    python -m sdv_jax.small_world.base --config configs/small_world_wan_base.py --workdir runs/wan_base \\
        --out runs/wan_base/first
    python -m sdv_jax.small_world.base --config configs/small_world_wan_base_frames.py --workdir runs/wan_base \\
        --out models/small-world-wan

Every stage resumes where it stopped and is skipped once done; configs that share a workdir share all but the last.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from sdv_jax.checkpoints.save import save_pipeline
from sdv_jax.data import manifest, records
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.small_world import prepared
from sdv_jax.small_world.autoencoder import TINY_WAN_VAE, AutoencoderConfig
from sdv_jax.small_world.autoencoder import train as train_autoencoder
from sdv_jax.small_world.pool import clip_pool, pair_pool
from sdv_jax.small_world.tokenizer import MAX_LENGTH, build_tokenizer
from sdv_jax.small_world.world import World
from sdv_jax.train import config as configs
from sdv_jax.train import loop, setup

_VAE_POOL, _CLIP_POOL, _IMAGE_POOL = 100, 101, 102  # seeds: three pools of different subjects
_MEASURED = 512  # clips whose latents decide the scale


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is rendered: clips the autoencoder sees, and clips and still images the base is trained on."""

    autoencoder_clips: int = 6000
    clips: int = 10000
    images: int = 8000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a family's small base has of its own.

    scale: (mean, logvar of latents [n, t, h, w, c]) -> keys of the VAE's config that scale latents to unit variance.
    text: what transformers wants in text_encoder/config.json.
    """

    autoencoder: AutoencoderConfig
    scale: Callable[[np.ndarray, np.ndarray], dict]
    text: Mapping


def _one_factor(mean: np.ndarray, logvar: np.ndarray) -> dict:
    """One factor for all channels, of sampled latents (CogVideoX)."""
    return {"scaling_factor": round(float(1 / np.sqrt(np.var(mean) + np.mean(np.exp(logvar)))), 6)}


def _per_channel(mean: np.ndarray, logvar: np.ndarray) -> dict:
    """Mean and deviation of each channel, of the posterior's means (Wan)."""
    flat = mean.reshape(-1, mean.shape[-1]).astype(np.float64)
    return {name: tuple(round(float(x), 4) for x in values)
            for name, values in (("latents_mean", flat.mean(0)), ("latents_std", flat.std(0)))}  # fmt: skip


_TEXT = {
    "is_encoder_decoder": True, "is_gated_act": True, "dense_act_fn": "gelu_new", "dropout_rate": 0.0,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
RECIPES = {
    "cogvideox": Recipe(
        AutoencoderConfig(), _one_factor, {"architectures": ["T5EncoderModel"], "model_type": "t5"} | _TEXT
    ),
    "wan": Recipe(
        AutoencoderConfig(vae=TINY_WAN_VAE), _per_channel,
        {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "scalable_attention": True} | _TEXT,
    ),
}  # fmt: skip


def make(
    config: configs.Config,
    workdir: str | Path,
    out: str | Path,
    *,
    run: str = "base",
    autoencoder: AutoencoderConfig | None = None,
    sizes: Sizes = Sizes(),
) -> None:
    """Trains everything under `workdir`, the base itself in its folder `run`, and writes the pipeline folder `out`."""
    workdir, world, recipe = Path(workdir), World(), RECIPES[config.model.family]
    pieces = build_tokenizer(workdir / "tokenizer")
    vae = _autoencoder(world, autoencoder or recipe.autoencoder, workdir / "autoencoder", sizes.autoencoder_clips)
    vae = _scaled(world, vae, recipe, workdir / "scale.json", sizes)
    tables = {
        "text_encoder": {"vocab_size": pieces, **config.model.text_encoder},
        "vae": dataclasses.asdict(vae.config),
    }
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **tables),
        data=dataclasses.replace(config.data, identity=str(workdir / "images"), motion=str(workdir / "clips")),
    )
    _prepare(world, vae, setup.about(config), workdir, sizes)
    result = loop.run(config, workdir / run)
    if result.finished:
        write(result.model, vae, config, workdir / "tokenizer", out)


def write(model, vae: nnx.Module, config: configs.Config, tokenizer: Path, out: str | Path) -> None:
    """The pipeline folder of a trained base."""
    family, recipe = setup.about(config).family, RECIPES[config.model.family]
    encoder = model.text_encoder
    modules = {"transformer": model.transformer, "vae": vae, "text_encoder": encoder}
    save_pipeline(
        out, family, modules, {"text_encoder": {**recipe.text, **dataclasses.asdict(encoder.config)}},
        scheduler=config.model.scheduler, tokenizer=tokenizer, index=config.model.index, defaults=config.model.defaults,
    )  # fmt: skip


def _autoencoder(world: World, config: AutoencoderConfig, workdir: Path, clips: int) -> nnx.Module:
    video = clip_pool(world, _VAE_POOL, clips).video
    return train_autoencoder(config, lambda rng, n: video[rng.integers(len(video), size=n)], workdir=workdir)


def _scaled(world: World, vae: nnx.Module, recipe: Recipe, note: Path, sizes: Sizes) -> nnx.Module:
    """The VAE with the scale of its latents in its config; measured once, and noted."""
    if not note.is_file():
        clips = clip_pool(world, _CLIP_POOL, sizes.clips).video[:_MEASURED]
        note.write_text(json.dumps(recipe.scale(*prepared.encode(vae, clips, desc="measuring latents"))))
    vae = nnx.clone(vae)
    found = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(note.read_text()).items()}
    vae.config = dataclasses.replace(vae.config, **found)
    return vae


def _prepare(world: World, vae: nnx.Module, base: setup.About, workdir: Path, sizes: Sizes) -> None:
    """Writes `clips` and `images` under `workdir`, if they are not there."""
    tokenizer, scale = Tokenizer(workdir / "tokenizer"), base.traits.latents

    def ids(captions):
        return tokenizer.tokenize(captions, max_length=MAX_LENGTH)[0]

    if not (workdir / "clips" / manifest.FILE).is_file():
        clips = clip_pool(world, _CLIP_POOL, sizes.clips)
        made = prepared.dataset(vae, scale, clips.video, clips.video[:, :1], clips.captions, ids)
        records.save(workdir / "clips", made)
    if not (workdir / "images" / manifest.FILE).is_file():
        pairs = pair_pool(world, _IMAGE_POOL, sizes.images, marked=False)
        stills = pairs.target[:, None]
        records.save(workdir / "images", prepared.dataset(vae, scale, stills, stills, pairs.captions, ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/small_world_base.py")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    arguments, overrides = parser.parse_known_args()
    config = configs.load(arguments.config, overrides)
    make(config, arguments.workdir, arguments.out, run=Path(arguments.config).stem)


if __name__ == "__main__":
    main()
