"""From a configuration to the things a loop needs: base model, adapter, objective."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import model_folder
from sdv_jax.checkpoints.families import families, rules_of
from sdv_jax.checkpoints.model_folder import About
from sdv_jax.diffusion import FlowSchedule, noise_schedule
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale, check_defaults
from sdv_jax.objectives.denoising import Denoiser, Objective
from sdv_jax.sharding import Table
from sdv_jax.train.config import Config

TRAINED = ("v_prediction", "flow_prediction")  # what a network may predict


def about(config: Config) -> About:
    """The base model of a run: that of model.path, or one of the sizes in the config's own tables."""
    if config.model.path:
        return model_folder.about(config.model.path)
    m = config.model
    if not m.transformer:
        raise UserError(
            "config keys 'model.path' and 'model.transformer' are empty: give a model folder, or sizes of a new model"
        )
    family = next((family for family in families() if family.name == m.family), None)
    if family is None:
        known = ", ".join(family.name for family in families())
        raise UserError(f"config key 'model.family': expected one of {known}, found {m.family!r}")
    tables = {"transformer": m.transformer, "vae": m.vae, "text_encoder": m.text_encoder}
    configs = {name: family.components[name].make(table, f"model.{name}") for name, table in tables.items()}
    if unknown := sorted(set(m.index) - set(family.index)):
        known = ", ".join(family.index) or "none"
        raise UserError(f"config key 'model.index.{unknown[0]}' does not exist: known of {family.name} are {known}")
    defaults = check_defaults(m.defaults, "model.defaults")
    raw = {"variant": "custom", "scheduler": m.scheduler, "defaults": defaults, "model_index": m.index}
    return About(raw, family, configs, family.traits(configs, raw))


def model(config: Config, base: About, *, token_ids: bool, mesh: jax.sharding.Mesh | None = None) -> Denoiser:
    """The model of the run, with its adapter in mode lora; `token_ids` says that batches need the text encoder.

    A stored model is read straight into its place on `mesh`; new weights are made whole on every process. Weights that
    are trained are float32, whatever model.dtype says: steps of Adam are lost in the 8 bits of a bfloat16.
    """
    if config.text.train_encoder and not token_ids:
        raise UserError(
            "text.train_encoder=true needs data with token ids, found text embeddings; prepare the data with token ids"
        )
    names = (base.family.denoiser, "text_encoder") if token_ids else (base.family.denoiser,)
    rngs = nnx.Rngs(config.train.seed)
    found = [
        model_folder.load_component(config.model.path, name, _dtype(config, name), mesh)
        if config.model.path
        else base.family.components[name].module(base.configs[name], dtype=_dtype(config, name), rngs=rngs)
        for name in names
    ]
    denoiser = Denoiser(*found, text_masked=base.traits.text_masked)
    if config.train.mode == "lora":
        c = config.lora
        settings = lora.LoraConfig(rank=c.rank, alpha=c.alpha, targets=targets(config, base), dropout=c.dropout)
        _, rules = rules_of(denoiser.transformer)
        lora.add(denoiser.transformer, settings, names=rules.to_torch_module_name, rngs=nnx.Rngs(config.train.seed))
    return denoiser


def _dtype(config: Config, name: str) -> jnp.dtype:
    """Of the base weights of a component."""
    frozen = config.train.mode == "lora" or (name == "text_encoder" and not config.text.train_encoder)
    return jnp.dtype(config.model.dtype) if frozen else jnp.dtype("float32")


def placements(base: About) -> dict[str, Table]:
    """The sharding tables of the parts of a `Denoiser`."""
    family = base.family
    return {"transformer": family.placement(family.denoiser), "text_encoder": family.placement("text_encoder")}


def targets(config: Config, base: About) -> tuple[str, ...]:
    """The PEFT suffixes of the run's adapter."""
    return config.lora.targets or base.family.lora_targets


def stated_placement(config: Config, base: About) -> dict | None:
    """Where this run's references stand, in full, for the adapter to say; None where the family leaves no choice."""
    placement = options(config, base).get("placement")
    return dataclasses.asdict(placement) if placement else None


def options(config: Config, base: About) -> dict:
    """Keywords of the transformer's call; UserError for settings that the family does not have."""
    given = {key: value for key, value in dataclasses.asdict(config.reference).items() if value != ""}
    return base.family.options(config.lora.adaln, given)


def objective(config: Config, base: About, latents: LatentScale) -> Objective:
    """What the losses hold fixed. Raises UserError for settings that the family does not have."""
    schedule = noise_schedule(base.family.scheduler(base.raw["scheduler"]))
    if schedule.config.prediction_type not in TRAINED:
        raise UserError(
            f"scheduler: prediction_type is {schedule.config.prediction_type!r}; training needs 'v_prediction' or "
            "a flow"
        )
    if config.noise.shift and not isinstance(schedule, FlowSchedule):
        found = f"{schedule.config.class_name} has no shift, found {config.noise.shift}"
        raise UserError(f"config key 'noise.shift': {found}; leave it 0")
    traits = base.traits
    if config.text_to_video.first_frame and traits.image_latents is None:
        raise UserError("config key 'text_to_video.first_frame': this model takes no first frame; leave it 0")
    noise = dataclasses.asdict(config.noise) | {"shift": config.noise.shift or None}
    return Objective(
        schedule=schedule, latents=latents, geometry=traits.geometry, image_latents=traits.image_latents,
        clamps_image=traits.clamps_image, text_dropout=config.text.dropout,
        options=tuple(options(config, base).items()), dtype=jnp.dtype(config.train.dtype), **noise,
    )  # fmt: skip
