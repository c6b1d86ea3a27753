"""The data a configuration names: opened, compared with each other and with the model; the small world's made."""

import reprlib
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from sdv_jax.checkpoints import model_folder
from sdv_jax.data import manifest, raw, records
from sdv_jax.data.encoding import TextEncoder
from sdv_jax.data.latents import LatentDataset
from sdv_jax.data.loading import Dataset, Mixture
from sdv_jax.data.records import Prepared
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale, Traits
from sdv_jax.small_world import pool, prepared
from sdv_jax.small_world.world import World
from sdv_jax.train import plan
from sdv_jax.train.config import Config
from sdv_jax.train.processes import is_writer, wait_for

SMALL_WORLD = "small_world"


def load(config: Config, cache: Path) -> dict[str, Mixture]:
    """The prepared data a run reads, checked to agree on their VAE and their empty prompt.

    A name in `data` is a folder, or several with their shares, "a=2,b=1". One that ends in .py describes a raw set
    (`raw.load`). Data of the small world are rendered and encoded once and kept in `cache`, by what made them.
    """
    sources = {name: getattr(config.data, name) for name in plan.needed(config)}
    found = {name: _mixture(config, name, source, cache) for name, source in sources.items() if source}
    check_agreement(found)
    return found


def check_agreement(data: Mapping[str, Mixture]) -> None:
    """Raises UserError unless all datasets are of one VAE and one text encoder."""
    every = [(name, each, dataset) for name, mixture in data.items() for each, dataset in mixture.sets.items()]
    for name, each, dataset in every:
        first_name, first_each, first = every[0]
        if dataset.scale != first.scale or dataset.empty_text.shape != first.empty_text.shape:
            raise UserError(
                f"data.{name} ({each}) and data.{first_name} ({first_each}) are of different models: prepare both with "
                "the same one"
            )


def _mixture(config: Config, name: str, source: str, cache: Path) -> Mixture:
    shares = {}
    for entry in source.split(","):
        folder, _, share = entry.strip().rpartition("=") if "=" in entry else (entry.strip(), "=", "1")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if not folder or folder in shares or not 0 < number < float("inf"):
            raise UserError(
                f"config key 'data.{name}': {entry.strip()!r} is not understood; expected FOLDER, or FOLDER=SHARE with "
                "a share above 0, each folder once, with commas between them"
            )
        shares[folder] = number
    return Mixture({folder: _open(config, name, folder, cache) for folder in shares}, shares)


def _open(config: Config, name: str, source: str, cache: Path) -> Dataset:
    if source == SMALL_WORLD:
        return _small_world(config, name, cache)
    if not source.endswith(raw.SUFFIX):
        return records.load(source)
    if not config.model.path or config.data.workers:
        what = "data.workers to be 0" if config.model.path else "model.path, for its VAE and text encoder"
        raise UserError(f"config key 'data.{name}': {source} is a raw set, encoded while training, and needs {what}")
    return raw.load(source, model=config.model.path, embed=not config.text.train_encoder)


def check(config: Config, data: Mapping[str, Mixture], traits: Traits) -> None:
    """Raises UserError unless every dataset is what the VAE and the text encoder of this model make."""
    for name, mixture in data.items():
        for each, dataset in mixture.sets.items():
            where = f"data.{name} ({each})" if each != name else f"data.{name}"
            for bucket in dataset.buckets:
                _check_bucket(config, name, where, bucket.shapes, traits, token_ids=bucket.has_token_ids)
            if config.model.path:
                _check_scale(where, dataset.scale, traits.latents, config.model.path)


def _check_bucket(
    config: Config, name: str, where: str, shapes: Mapping[str, tuple[int, ...]], traits: Traits, *, token_ids: bool
) -> None:
    _check_latents(where, shapes["mean"], traits)
    if (views := shapes["reference_mean"][0]) < (wanted := getattr(config, name).references):
        asked = f"expected {name}.references = {wanted} or more"
        raise UserError(f"{where}: {views} reference views per example, {asked}")
    if name == "motion" and config.text_to_video.first_frame and shapes["mean"][0] < 2:
        raise UserError(
            f"{where}: clips have one latent frame, expected more: a first frame is given "
            "(text_to_video.first_frame), and the rest is what is learned"
        )
    length, width = shapes["text"][0], None if token_ids else shapes["text"][1]
    if length != traits.text_length:
        raise UserError(
            f"{where}: text has {length} tokens, expected {traits.text_length}, the model's text length; prepare it "
            "with this model's tokenizer and length"
        )
    if width not in (None, traits.text_width):
        raise UserError(
            f"{where}: text embeddings have width {width}, expected {traits.text_width}; prepare it with this model's "
            "text encoder"
        )


def _check_latents(where: str, shape: tuple[int, ...], traits: Traits) -> None:
    frames, height, width, channels = shape
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


def _small_world(config: Config, name: str, cache: Path) -> Prepared:
    about = repr((name, config.small_world, config.model.path, config.text.train_encoder))
    folder = cache / f"{name}_{zlib.crc32(about.encode()):08x}"
    if is_writer() and not (folder / manifest.FILE).is_file():
        records.save(folder, _render(config, name))
    wait_for(folder / manifest.FILE)
    return records.load(folder)


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
