"""From a configuration to the things a loop needs: datasets, model, objective."""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import model_folder
from sdv_jax.checkpoints.diffusers_folder import parse_component
from sdv_jax.checkpoints.families import rules_of
from sdv_jax.data import latents
from sdv_jax.data.latents import LatentDataset
from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from sdv_jax.models.text.t5 import T5Config, T5Encoder
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.objectives.denoising import Denoiser, Objective
from sdv_jax.small_world import pool, prepared
from sdv_jax.small_world.world import World
from sdv_jax.train import plan
from sdv_jax.train.config import Config

SMALL_WORLD = "small_world"
TEXTS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model ready to be trained, and its noise schedule."""

    model: Denoiser
    schedule: Schedule


def datasets(config: Config, cache: Path) -> dict[str, LatentDataset]:
    """The prepared data a run reads, checked to agree on its VAE and its empty prompt.

    Data of the small world are rendered and encoded once and kept in `cache`, by what made them.
    """
    sources = {name: getattr(config.data, name) for name in plan.needed(config)}
    found = {
        name: _small_world(config, name, cache) if source == SMALL_WORLD else latents.load(source)
        for name, source in sources.items() if source
    }  # fmt: skip
    first = next(iter(found.values()), None)
    for name, dataset in found.items():
        if dataset.scaling_factor != first.scaling_factor or dataset.empty_text.shape != first.empty_text.shape:
            raise UserError(
                f"data.{name} and the other prepared data are of different models: prepare both with the same one"
            )
    return found


def check_data(config: Config, data: Mapping[str, LatentDataset], model: TransformerConfig) -> None:
    """Raises UserError unless every dataset is what the VAE and the text encoder of this model make."""
    for name, dataset in data.items():
        source = getattr(config.data, name)
        where = f"data.{name} ({source})" if source else f"data.{name}"
        _check_latents(where, dataset, model)
        length, width = dataset.text.shape[1], None if dataset.has_token_ids else dataset.text.shape[2]
        if length != model.max_text_seq_length:
            raise UserError(
                f"{where}: text has {length} tokens, expected {model.max_text_seq_length}, the model's "
                "max_text_seq_length; prepare it with this model's tokenizer and length"
            )
        if width not in (None, model.text_embed_dim):
            raise UserError(
                f"{where}: text embeddings have width {width}, expected {model.text_embed_dim}, the model's "
                "text_embed_dim; prepare it with this model's text encoder"
            )
        own = _vae_scale(config.model.path) if config.model.path else dataset.scaling_factor
        if not math.isclose(dataset.scaling_factor, own, rel_tol=1e-4):
            raise UserError(
                f"{where}: scaling_factor is {dataset.scaling_factor}, expected {own}, that of the VAE in "
                f"{config.model.path}; prepare it with this model's VAE"
            )


def _check_latents(where: str, dataset: LatentDataset, model: TransformerConfig) -> None:
    height, width, channels = dataset.mean.shape[2:]
    if channels != model.in_channels:
        raise UserError(
            f"{where}: latents have {channels} channels, expected {model.in_channels}, the model's in_channels; "
            "prepare it with this model's VAE"
        )
    if height % model.patch_size or width % model.patch_size:
        raise UserError(
            f"{where}: latents are {height} x {width} (height x width), expected multiples of {model.patch_size}, the "
            "model's patch_size; prepare it at another resolution"
        )


def _vae_scale(path: str) -> float:
    about = model_folder.read_config(path)
    family = model_folder.family_of(about, Path(path))
    return parse_component(family, "vae", about["config"]["vae"], Path(path) / "vae" / "config.json").scaling_factor


def parts(config: Config, *, token_ids: bool) -> Parts:
    """The model of the run, with its adapter in mode lora; `token_ids` says that batches need the text encoder."""
    if config.text.train_encoder and not token_ids:
        raise UserError(
            "text.train_encoder=true needs data with token ids, found text embeddings; prepare the data with token ids"
        )
    model, schedule = (_load if config.model.path else _random)(config, token_ids)
    if config.train.mode == "lora":
        c = config.lora
        settings = lora.LoraConfig(rank=c.rank, alpha=c.alpha, targets=c.targets, dropout=c.dropout)
        _, rules = rules_of(model.transformer)
        lora.add(model.transformer, settings, names=rules.to_torch_module_name, rngs=nnx.Rngs(config.train.seed))
    return Parts(model, schedule)


def objective(config: Config, schedule: Schedule, scaling_factor: float) -> Objective:
    """What the losses hold fixed."""
    if schedule.config.prediction_type != "v_prediction":
        raise UserError(
            f"scheduler: prediction_type is {schedule.config.prediction_type!r}; training needs 'v_prediction'"
        )
    noise = dataclasses.asdict(config.noise)
    return Objective(
        schedule=schedule, scaling_factor=scaling_factor, text_dropout=config.text.dropout,
        adaln_lora=config.lora.adaln, dtype=jnp.dtype(config.train.dtype), **noise,
    )  # fmt: skip


def _small_world(config: Config, name: str, cache: Path) -> LatentDataset:
    about = repr((name, config.small_world, config.model.path, config.text.train_encoder))
    folder = cache / f"{name}_{zlib.crc32(about.encode()):08x}"
    if not (folder / "dataset.json").is_file():
        latents.save(_render(config, name), folder)
    return latents.load(folder)


def _render(config: Config, name: str) -> LatentDataset:
    path, options = config.model.path, config.small_world
    if not path:
        raise UserError(
            f"config key 'data.{name}' is \"small_world\", which needs model.path for its VAE and tokenizer, found ''"
        )
    vae = model_folder.load_component(path, "vae")
    encode = partial(
        prepared.dataset,
        vae,
        vae.config.scaling_factor,
        encode_text=_text_reader(path, embed=not config.text.train_encoder),
    )
    if name == "identity":
        pairs = pool.pair_pool(World(), options.seed, options.pairs)
        return encode(pairs.target[:, None], pairs.reference[:, None], pairs.captions)
    clips = pool.clip_pool(World(), options.seed, options.clips, marked=options.marked_clips)
    return encode(clips.video, clips.video, clips.captions)


def _text_reader(path: str, *, embed: bool) -> prepared.EncodeText:
    """Captions to embeddings, or to token ids where the text encoder is trained along."""
    tokenizer = Tokenizer(Path(path) / "tokenizer")
    length = model_folder.read_config(path)["config"]["transformer"]["max_text_seq_length"]
    encoder = nnx.split(model_folder.load_component(path, "text_encoder")) if embed else None

    def read(captions: Sequence[str]) -> np.ndarray:
        ids, _ = tokenizer.tokenize(captions, max_length=length)
        if encoder is None:
            return ids
        unique, rows = np.unique(ids, axis=0, return_inverse=True)
        parts = np.array_split(unique, -(-len(unique) // TEXTS_AT_ONCE))
        return np.concatenate([_embed(*encoder, part) for part in parts])[rows]

    return read


@partial(jax.jit, static_argnums=0)
def _embed(graph, state, ids):
    return nnx.merge(graph, state)(ids)


def _load(config: Config, token_ids: bool) -> tuple[Denoiser, Schedule]:
    path, dtype = config.model.path, jnp.dtype(config.model.dtype)
    transformer = model_folder.load_component(path, "transformer", dtype)
    text_encoder = model_folder.load_component(path, "text_encoder", dtype) if token_ids else None
    scheduler = SchedulerConfig.from_dict(model_folder.read_config(path)["scheduler"])
    return Denoiser(transformer, text_encoder), Schedule(scheduler)


def _random(config: Config, token_ids: bool) -> tuple[Denoiser, Schedule]:
    """Random weights at the sizes of the config's own tables."""
    rngs, dtype = nnx.Rngs(config.train.seed), jnp.dtype(config.model.dtype)
    if not config.model.transformer:
        raise UserError(
            "config keys 'model.path' and 'model.transformer' are empty: give a model folder, or sizes of a new model"
        )
    transformer = Transformer(
        _from_table(TransformerConfig, config.model.transformer, "model.transformer"), dtype=dtype, rngs=rngs
    )
    text_encoder = None
    if token_ids:
        text_encoder = T5Encoder(
            _from_table(T5Config, config.model.text_encoder, "model.text_encoder"), dtype=dtype, rngs=rngs
        )
    return Denoiser(transformer, text_encoder), Schedule(SchedulerConfig.from_dict(config.model.scheduler))


def _from_table(cls: type, table: Mapping[str, Any], key: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(name for name in table if name not in known and not name.startswith("_"))
    if unknown:
        raise UserError(f"config key {key + '.' + unknown[0]!r} does not exist: known are {', '.join(sorted(known))}")
    return cls(**{name: value for name, value in table.items() if name in known})
