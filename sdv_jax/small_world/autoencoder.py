"""Training of a small VAE, CogVideoX's or Wan's, from nothing, on clips and single frames of the small world."""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sdv_jax.errors import UserError
from sdv_jax.models import cogvideox, wan
from sdv_jax.models.cogvideox.vae import VAE as CogVideoXVAE
from sdv_jax.models.cogvideox.vae_blocks import SpatialNorm
from sdv_jax.models.wan.vae import VAE as WanVAE
from sdv_jax.typing import Array, Float, Key, UInt8

SampleBatch = Callable[[np.random.Generator, int], np.ndarray]

_LEVELS = 3
TINY_VAE = cogvideox.VAEConfig(
    down_block_types=("CogVideoXDownBlock3D",) * _LEVELS,
    up_block_types=("CogVideoXUpBlock3D",) * _LEVELS,
    block_out_channels=(16, 32, 64),
    latent_channels=8,
    layers_per_block=1,
    norm_num_groups=8,
    sample_height=32,
    sample_width=32,
    scaling_factor=1.0,
)

# Wan 2.2's kind with residual shortcuts and four frames in one latent, but 4 pixels instead of 16: 32 of them are few.
# Without its patches, so that the transformer can have them as published (diffusers' pipelines expect 2 x 2).
TINY_WAN_VAE = wan.VAEConfig(
    base_dim=16, decoder_base_dim=16, z_dim=12, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(True, True),
    is_residual=True, scale_factor_spatial=4, scale_factor_temporal=4, latents_mean=(0.0,) * 12,
    latents_std=(1.0,) * 12,
)  # fmt: skip
_MODULES = {cogvideox.VAEConfig: CogVideoXVAE, wan.VAEConfig: WanVAE}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What to train and how.

    Attributes:
      vae: the model.
      steps: optimiser steps in all; a finished run that is started again returns its model.
      batch_size: clips per step.
      images: single frames per step, drawn from further clips: one alone is encoded differently from a clip's first.
      learning_rate: peak of the cosine schedule.
      warmup: steps of linear warm-up.
      weight_decay, clip_norm: of AdamW and of the gradient.
      l1, l2: weights of the mean absolute and squared error, in pixels of [-1, 1].
      edges: weight of the mean absolute error of differences between neighbouring pixels, which keeps edges sharp.
      kl: weight of the mean KL divergence per latent element from a unit Gaussian.
      seed: of the weights, the batches and the latent noise.
      save_every: steps between checkpoints.
      log_every: steps between lines of metrics.
    """

    vae: cogvideox.VAEConfig | wan.VAEConfig = TINY_VAE
    steps: int = 2400
    batch_size: int = 2
    images: int = 4
    learning_rate: float = 5e-3
    warmup: int = 100
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    l1: float = 1.0
    l2: float = 1.0
    edges: float = 0.5
    kl: float = 1e-4
    seed: int = 0
    save_every: int = 200
    log_every: int = 20


def train(config: AutoencoderConfig, sample_batch: SampleBatch, *, workdir: str | Path) -> nnx.Module:
    """Trains a VAE, or goes on from the checkpoint in `workdir`, and returns it.

    Args:
      config: the run.
      sample_batch: `(generator, n) -> uint8 [n, t, h, w, 3]`; called with a generator that depends only on seed and
        step, so a resumed run sees the batches that an uninterrupted one sees.
      workdir: gets `autoencoder.npz` (weights, optimiser, step) and `metrics.jsonl`.

    Raises:
      UserError: when `workdir` holds a run of another config.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    graph, params = nnx.split(well_conditioned(_MODULES[type(config.vae)](config.vae, rngs=nnx.Rngs(config.seed))))
    params = nnx.to_pure_dict(params)
    optimizer = make_optimizer(config)
    state = (params, optimizer.init(params))
    start, state = _restore(workdir / "autoencoder.npz", config, state)
    step_fn = make_step(config, graph, optimizer)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="autoencoder")
    for step in bar:
        clips, images = _batch(config, sample_batch, step)
        state, metrics = step_fn(state, clips, images, jax.random.fold_in(jax.random.key(config.seed), step))
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            values = {name: round(float(value), 5) for name, value in metrics.items()}
            bar.set_postfix(values)
            with open(workdir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": done, **values}) + "\n")
        if done % config.save_every == 0 or done == config.steps:
            _save(workdir / "autoencoder.npz", config, done, state)
    return nnx.merge(graph, state[0])


def make_optimizer(config: AutoencoderConfig) -> optax.GradientTransformation:
    """Muon for kernels, Adam for the rest; clipped gradients, linear warm-up and cosine decay to zero.

    Muon sees a kernel as one matrix from all its taps and input channels to its outputs. It halved the steps that Adam
    needed for the same loss here, and its updates are scaled to Adam's size (arXiv 2502.16982, 2.2) so that both
    share a rate.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup, config.steps // 2), config.steps
    )
    muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices), optax.stateless(_like_adam))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition({"muon": muon, "adam": optax.scale_by_adam(b2=0.99)}, _labels),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _labels(params):
    return jax.tree.map(lambda x: "muon" if x.ndim >= 4 and min(x.shape[-2:]) >= 4 else "adam", params)


def _matrices(params):
    def axes(x):
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if hasattr(x, "ndim") else None

    return jax.tree.map(axes, params)


def _like_adam(updates, _):
    return jax.tree.map(lambda u: 0.2 * max(math.prod(u.shape[:-1]), u.shape[-1]) ** 0.5 * u, updates)


def well_conditioned(vae: nnx.Module) -> nnx.Module:
    """The same fresh model with a start that trains.

    CogVideoX's decoder begins with norms near the plain group norm instead of scaling by random linear forms of the
    latents, and latents begin with little noise.
    """
    for _, module in nnx.iter_modules(vae):
        if isinstance(module, SpatialNorm):
            module.conv_y.bias[...] = jnp.ones_like(module.conv_y.bias[...])
            for conv in (module.conv_y, module.conv_b):
                conv.kernel[...] *= 0.1
    bias = (vae.quant_conv if isinstance(vae, WanVAE) else vae.encoder.conv_out).bias
    bias[...] = bias[...].at[bias.shape[0] // 2 :].set(-4.0)
    return vae


def make_step(config: AutoencoderConfig, graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """The jitted `(state, clips, images, key) -> (state, metrics)` on uint8 pixels; the old state is donated."""

    def objective(params, clips, images, key):
        model = nnx.merge(graph, params)
        keys = jax.random.split(key)
        terms = [loss(config, model, pixels, key) for pixels, key in zip((clips, images), keys, strict=True)]
        # A clip and a frame weigh the same: a frame is both the reference image and the start of every clip.
        return (terms[0][0] + terms[1][0]) / 2, {"psnr": terms[0][1], "psnr_image": terms[1][1]}

    def step(state, clips, images, key):
        params, moments = state
        (value, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params, clips, images, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), {"loss": value, **metrics}

    return jax.jit(step, donate_argnums=0)


def loss(
    config: AutoencoderConfig, model: nnx.Module, pixels: UInt8[Array, "b t h w c"], key: Key[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(training loss, PSNR in dB) of reconstructing uint8 clips through sampled latents."""
    target = pixels.astype(jnp.float32) / 127.5 - 1
    mean, logvar = model.encode(target)
    drawn = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    # Clipped pixels have no gradient, and Wan's decoder clips.
    decoded = model.decode(drawn, clip=False) if isinstance(model, WanVAE) else model.decode(drawn)
    error = decoded - target
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (2, 3))
    divergence = (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean() / 2
    square = jnp.square(error).mean()
    total = config.l1 * jnp.abs(error).mean() + config.l2 * square + config.edges * edges + config.kl * divergence
    return total, 10 * jnp.log10(4 / square)


def _batch(config: AutoencoderConfig, sample_batch: SampleBatch, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(clips, single frames) of one step."""
    rng = np.random.default_rng((config.seed, step))
    video = np.asarray(sample_batch(rng, config.batch_size + config.images))
    clips, rest = video[: config.batch_size], video[config.batch_size :]
    frames = rng.integers(video.shape[1], size=len(rest))
    return clips, rest[np.arange(len(rest)), frames][:, None]


def _identity(config: AutoencoderConfig) -> str:
    """What two runs must share for one to go on where the other stopped."""
    fields = dataclasses.asdict(config)
    return json.dumps({name: value for name, value in fields.items() if name not in ("save_every", "log_every")})


def _save(path: Path, config: AutoencoderConfig, step: int, state) -> None:
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, config=_identity(config), step=step, **leaves)
    os.replace(unfinished, path)  # a run killed while writing keeps its last checkpoint


def _restore(path: Path, config: AutoencoderConfig, state) -> tuple[int, tuple]:
    """(steps done, state): from the checkpoint, or 0 and the given state."""
    if not path.exists():
        return 0, state
    with np.load(path) as saved:
        if str(saved["config"]) != _identity(config):
            raise UserError(f"autoencoder: {path} belongs to a run of another config; use another workdir or remove it")
        leaves, tree = jax.tree.flatten(state)
        return int(saved["step"]), tree.unflatten([jnp.asarray(saved[f"leaf_{i}"]) for i in range(len(leaves))])
