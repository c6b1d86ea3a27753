"""The base model of the small world, from nothing: autoencoder, data, text-to-video training, diffusers folder.

    python -m sdv_jax.small_world.base --config configs/small_world_base.py --workdir runs/base \\
        --out models/small-world-cogvideox

Every stage resumes where it stopped and is skipped once done.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from flax import nnx

from sdv_jax.checkpoints.families import COGVIDEOX
from sdv_jax.checkpoints.save import diffusers_config, save_pipeline
from sdv_jax.data import latents
from sdv_jax.models.cogvideox.vae import VAE
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.small_world import prepared
from sdv_jax.small_world.autoencoder import AutoencoderConfig
from sdv_jax.small_world.autoencoder import train as train_autoencoder
from sdv_jax.small_world.pool import clip_pool, pair_pool
from sdv_jax.small_world.tokenizer import MAX_LENGTH, build_tokenizer
from sdv_jax.small_world.world import World
from sdv_jax.train import config as configs
from sdv_jax.train import loop

_VAE_POOL, _CLIP_POOL, _IMAGE_POOL = 100, 101, 102  # seeds: three pools of different subjects


AUTOENCODER = AutoencoderConfig()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is rendered: clips the autoencoder sees, and clips and still images the base is trained on."""

    autoencoder_clips: int = 6000
    clips: int = 10000
    images: int = 8000


def make(
    config: configs.Config,
    workdir: str | Path,
    out: str | Path,
    *,
    autoencoder: AutoencoderConfig = AUTOENCODER,
    sizes: Sizes = Sizes(),
) -> None:
    """Trains everything under `workdir` and writes the pipeline folder `out`."""
    workdir = Path(workdir)
    world = World()
    pieces = build_tokenizer(workdir / "tokenizer")
    vae = _autoencoder(world, autoencoder, workdir / "autoencoder", sizes.autoencoder_clips)
    scale = _prepare(world, vae, workdir, sizes)
    table = {"vocab_size": pieces, **config.model.text_encoder}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text_encoder=table),
        data=dataclasses.replace(config.data, identity=str(workdir / "images"), motion=str(workdir / "clips")),
    )
    result = loop.run(config, workdir / "base")
    if result.finished:
        write(result.model, vae, scale, config.model.scheduler, workdir / "tokenizer", out)


def write(model, vae: VAE, scale: float, scheduler: Mapping, tokenizer: Path, out: str | Path) -> None:
    """The pipeline folder of a trained base."""
    transformer, encoder = model.transformer, model.text_encoder
    vae = nnx.clone(vae)
    vae.config = dataclasses.replace(vae.config, scaling_factor=round(scale, 6))
    t5 = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **dataclasses.asdict(encoder.config),
    }
    save_pipeline(
        out, COGVIDEOX, {"transformer": transformer, "vae": vae, "text_encoder": encoder},
        {"transformer": diffusers_config("CogVideoXTransformer3DModel", transformer.config),
         "vae": diffusers_config("AutoencoderKLCogVideoX", vae.config), "text_encoder": t5},
        scheduler=scheduler, tokenizer=tokenizer,
    )  # fmt: skip


def _autoencoder(world: World, config: AutoencoderConfig, workdir: Path, clips: int) -> VAE:
    video = clip_pool(world, _VAE_POOL, clips).video
    return train_autoencoder(config, lambda rng, n: video[rng.integers(len(video), size=n)], workdir=workdir)


def _prepare(world: World, vae: VAE, workdir: Path, sizes: Sizes) -> float:
    """Writes `clips` and `images` under `workdir`, if they are not there, and returns the scaling factor."""
    note = workdir / "scaling_factor.json"
    if note.is_file():
        return json.loads(note.read_text())
    tokenizer = Tokenizer(workdir / "tokenizer")

    def ids(captions):
        return tokenizer.tokenize(captions, max_length=MAX_LENGTH)[0]

    clips, pairs = clip_pool(world, _CLIP_POOL, sizes.clips), pair_pool(world, _IMAGE_POOL, sizes.images, marked=False)
    scale = prepared.latent_scale(*prepared.encode(vae, clips.video[:512], desc="measuring latents"))
    latents.save(prepared.dataset(vae, scale, clips.video, clips.video[:, :1], clips.captions, ids), workdir / "clips")
    latents.save(
        prepared.dataset(vae, scale, pairs.target[:, None], pairs.target[:, None], pairs.captions, ids),
        workdir / "images",
    )
    note.write_text(json.dumps(scale))
    return scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/small_world_base.py")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--out", required=True)
    arguments, overrides = parser.parse_known_args()
    make(configs.load(arguments.config, overrides), arguments.workdir, arguments.out)


if __name__ == "__main__":
    main()
