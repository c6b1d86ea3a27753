"""From a configuration to the things a loop needs: datasets, base model, objective."""

import dataclasses
import reprlib
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import model_folder
from sdv_jax.checkpoints.families import families, rules_of
from sdv_jax.checkpoints.model_folder import About
from sdv_jax.data import latents
from sdv_jax.data.encoding import TextEncoder
from sdv_jax.data.latents import LatentDataset
from sdv_jax.data.loading import Part
from sdv_jax.diffusion import FlowSchedule, noise_schedule
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale, Traits, check_defaults
from sdv_jax.objectives.denoising import Denoiser, Objective
from sdv_jax.sharding import Table
from sdv_jax.small_world import pool, prepared
from sdv_jax.small_world.world import World
from sdv_jax.train import plan
from sdv_jax.train.config import Config
from sdv_jax.train.processes import is_writer, together

SMALL_WORLD = "small_world"
TRAINED = ("v_prediction", "flow_prediction")  # what a network may predict


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
        if dataset.scale != first.scale or dataset.empty_text.shape != first.empty_text.shape:
            raise UserError(
                f"data.{name} and the other prepared data are of different models: prepare both with the same one"
            )
    return found


def parts(data: Mapping[str, LatentDataset]) -> dict[str, tuple[Part, ...]]:
    """Every row of each dataset, for the loader."""
    return {
        name: (Part(dataset, np.arange(len(dataset)), 1.0, name, dataset.fingerprint),)
        for name, dataset in data.items()
    }


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


def check_data(config: Config, data: Mapping[str, LatentDataset], traits: Traits) -> None:
    """Raises UserError unless every dataset is what the VAE and the text encoder of this model make."""
    for name, dataset in data.items():
        source = getattr(config.data, name)
        where = f"data.{name} ({source})" if source else f"data.{name}"
        _check_latents(where, dataset, traits)
        if (views := dataset.reference_mean.shape[1]) < (wanted := getattr(config, name).references):
            asked = f"expected {name}.references = {wanted} or more"
            raise UserError(f"{where}: {views} reference views per example, {asked}")
        if name == "motion" and config.text_to_video.first_frame and dataset.mean.shape[1] < 2:
            raise UserError(
                f"{where}: clips have one latent frame, expected more: a first frame is given "
                "(text_to_video.first_frame), and the rest is what is learned"
            )
        length, width = dataset.text.shape[1], None if dataset.has_token_ids else dataset.text.shape[2]
        if length != traits.text_length:
            raise UserError(
                f"{where}: text has {length} tokens, expected {traits.text_length}, the model's text length; prepare "
                "it with this model's tokenizer and length"
            )
        if width not in (None, traits.text_width):
            raise UserError(
                f"{where}: text embeddings have width {width}, expected {traits.text_width}; prepare it with this "
                "model's text encoder"
            )
        if config.model.path:
            _check_scale(where, dataset.scale, traits.latents, config.model.path)


def _check_latents(where: str, dataset: LatentDataset, traits: Traits) -> None:
    frames, height, width, channels = dataset.mean.shape[1:]
    g = traits.geometry
    if channels != g.channels:
        raise UserError(
            f"{where}: latents have {channels} channels, expected {g.channels}, the model's; prepare it with this "
            "model's VAE"
        )
    if height % g.patch or width % g.patch:
        raise UserError(
            f"{where}: latents are {height} x {width} (height x width), expected multiples of {g.patch}, the "
            "model's patch_size; prepare it at another resolution"
        )
    if frames % g.frame_patch:
        raise UserError(
            f"{where}: clips have {frames} latent frames, expected a multiple of {g.frame_patch}, the model's "
            "patch_size_t; prepare it at another length"
        )


def _check_scale(where: str, found: LatentScale, own: LatentScale, path: str) -> None:
    for name in ("shift", "scale"):
        have, want = getattr(found, name), getattr(own, name)
        if len(have) != len(want) or not np.allclose(have, want, rtol=1e-4, atol=1e-6):
            have, want = (reprlib.repr(values if len(values) > 1 else values[0]) for values in (have, want))
            raise UserError(
                f"{where}: {name} of its latents is {have}, expected {want}, that of the VAE in {path}; prepare it "
                "with this model's VAE"
            )


def model(config: Config, base: About, *, token_ids: bool, mesh: jax.sharding.Mesh | None = None) -> Denoiser:
    """The model of the run, with its adapter in mode lora; `token_ids` says that batches need the text encoder.

    A stored model is read straight into its place on `mesh`; new weights are made whole on every process.
    """
    if config.text.train_encoder and not token_ids:
        raise UserError(
            "text.train_encoder=true needs data with token ids, found text embeddings; prepare the data with token ids"
        )
    names = (base.family.denoiser, "text_encoder") if token_ids else (base.family.denoiser,)
    rngs, dtype = nnx.Rngs(config.train.seed), jnp.dtype(config.model.dtype)
    found = [
        model_folder.load_component(config.model.path, name, dtype, mesh)
        if config.model.path
        else base.family.components[name].module(base.configs[name], dtype=dtype, rngs=rngs)
        for name in names
    ]
    denoiser = Denoiser(*found, text_masked=base.traits.text_masked)
    if config.train.mode == "lora":
        c = config.lora
        settings = lora.LoraConfig(rank=c.rank, alpha=c.alpha, targets=targets(config, base), dropout=c.dropout)
        _, rules = rules_of(denoiser.transformer)
        lora.add(denoiser.transformer, settings, names=rules.to_torch_module_name, rngs=nnx.Rngs(config.train.seed))
    return denoiser


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


def _small_world(config: Config, name: str, cache: Path) -> LatentDataset:
    about = repr((name, config.small_world, config.model.path, config.text.train_encoder))
    folder = cache / f"{name}_{zlib.crc32(about.encode()):08x}"
    if is_writer() and not (folder / "dataset.json").is_file():
        latents.save(_render(config, name), folder)
    together(f"data.{name} is rendered")
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
        model_folder.about(path).traits.latents,
        encode_text=TextEncoder(path, embed=not config.text.train_encoder),
    )
    if name == "identity":
        pairs = pool.pair_pool(World(), options.seed, options.pairs)
        return encode(pairs.target[:, None], pairs.reference[:, None], pairs.captions)
    clips = pool.clip_pool(World(), options.seed, options.clips, marked=options.marked_clips)
    return encode(clips.video, clips.video, clips.captions)
