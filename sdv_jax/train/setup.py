"""From a configuration to the things a loop needs: datasets, model, objective."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.data import latents
from sdv_jax.data.latents import LatentDataset
from sdv_jax.diffusion.schedules import Schedule, SchedulerConfig
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from sdv_jax.models.text.t5 import T5Config, T5Encoder
from sdv_jax.objectives.denoising import Denoiser, Objective
from sdv_jax.train import plan
from sdv_jax.train.config import Config


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model ready to be trained, its noise schedule, and where its weights came from ("" = random)."""

    model: Denoiser
    schedule: Schedule


def datasets(config: Config) -> dict[str, LatentDataset]:
    """The prepared data a run reads, checked to agree on its VAE and its empty prompt."""
    found = {name: latents.load(getattr(config.data, name)) for name in plan.needed(config) if getattr(config.data, name)}
    first = next(iter(found.values()), None)
    for name, dataset in found.items():
        if dataset.scaling_factor != first.scaling_factor or dataset.empty_text.shape != first.empty_text.shape:
            raise UserError(f"data.{name} and the other prepared data are of different models: prepare both with the same one")
    return found


def parts(config: Config, *, token_ids: bool) -> Parts:
    """The model of the run, with its adapter in mode lora; `token_ids` says that batches need the text encoder."""
    if config.text.train_encoder and not token_ids:
        raise UserError("text.train_encoder=true needs data with token ids, found text embeddings; prepare the data with token ids")
    model, schedule = (_load if config.model.path else _random)(config, token_ids)
    if config.train.mode == "lora":
        c = config.lora
        settings = lora.LoraConfig(rank=c.rank, alpha=c.alpha, targets=c.targets, dropout=c.dropout)
        lora.add(model.transformer, settings, rngs=nnx.Rngs(config.train.seed))
    return Parts(model, schedule)


def objective(config: Config, schedule: Schedule, scaling_factor: float) -> Objective:
    """What the losses hold fixed."""
    if schedule.config.prediction_type != "v_prediction":
        raise UserError(f"scheduler: prediction_type is {schedule.config.prediction_type!r}; training needs 'v_prediction'")
    noise = dataclasses.asdict(config.noise)
    return Objective(
        schedule=schedule, scaling_factor=scaling_factor, text_dropout=config.text.dropout, adaln_lora=config.lora.adaln,
        dtype=jnp.dtype(config.train.dtype), **noise,
    )  # fmt: skip


def _load(config: Config, token_ids: bool) -> tuple[Denoiser, Schedule]:
    from sdv_jax.checkpoints import model_folder

    path, dtype = config.model.path, jnp.dtype(config.model.dtype)
    transformer = model_folder.load_component(path, "transformer", dtype=dtype)
    text_encoder = model_folder.load_component(path, "text_encoder", dtype=dtype) if token_ids else None
    return Denoiser(transformer, text_encoder), Schedule(model_folder.read_config(path).scheduler)


def _random(config: Config, token_ids: bool) -> tuple[Denoiser, Schedule]:
    """Random weights at the sizes of the config's own tables."""
    rngs, dtype = nnx.Rngs(config.train.seed), jnp.dtype(config.model.dtype)
    if not config.model.transformer:
        raise UserError("config key 'model.path' is empty, and so is model.transformer: give a model folder, or the sizes of a new model")
    transformer = Transformer(_from_table(TransformerConfig, config.model.transformer, "model.transformer"), dtype=dtype, rngs=rngs)
    text_encoder = None
    if token_ids:
        text_encoder = T5Encoder(_from_table(T5Config, config.model.text_encoder, "model.text_encoder"), dtype=dtype, rngs=rngs)
    return Denoiser(transformer, text_encoder), Schedule(SchedulerConfig.from_dict(config.model.scheduler))


def _from_table(cls: type, table: Mapping[str, Any], key: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(name for name in table if name not in known and not name.startswith("_"))
    if unknown:
        raise UserError(f"config key {key + '.' + unknown[0]!r} does not exist: known are {', '.join(sorted(known))}")
    return cls(**{name: value for name, value in table.items() if name in known})
