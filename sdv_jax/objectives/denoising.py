"""What every objective shares: model and text encoder, draws of latents, captions and timesteps, the loss on v.

CogVideoX's published loss is mean(w · (x0_hat - x0)²) with w = 1 / (1 - abar_t). Under v-prediction
x0_hat - x0 = -sqrt(1 - abar_t) · (v_hat - v), so that loss equals the plain mean((v_hat - v)²), which is what is
computed here.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.adapters import reference as references
from sdv_jax.diffusion.schedules import Schedule
from sdv_jax.models.cogvideox.transformer import Transformer
from sdv_jax.models.text.t5 import T5Encoder
from sdv_jax.typing import Array, Float, Int, Key

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


class Denoiser(nnx.Module):
    """A transformer and, where batches carry token ids, the text encoder that turns them into embeddings."""

    def __init__(self, transformer: Transformer, text_encoder: T5Encoder | None = None):
        self.transformer = transformer
        self.text_encoder = nnx.data(text_encoder)

    def encode_text(self, text: Float[Array, "b s e"] | Int[Array, "b s"], dtype) -> Float[Array, "b s e"]:
        """Embeddings as they are, token ids through the encoder."""
        embeddings = text if text.ndim == 3 else self.text_encoder(text)
        return embeddings.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Fixed over a run. `scaling_factor` is the VAE's; `dtype` is that of the activations, the loss is float32."""

    schedule: Schedule
    scaling_factor: float
    text_dropout: float = 0.0
    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    adaln_lora: str = "all"
    dtype: jnp.dtype = jnp.float32


def loss(
    model: Denoiser, latents: Float[Array, "b t h w c"], text: Float[Array, "b s e"] | Int[Array, "b s"],
    key: Key[Array, ""], *, objective: Objective, reference: Float[Array, "b k h w c"] | None = None,
    reference_index: Int[Array, "b r"] | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """Mean squared error of the predicted v on `latents` (in the transformer's scale), noised at drawn timesteps."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
    timesteps = draw_timesteps(time_key, latents.shape[0], objective)
    noisy = objective.schedule.add_noise(latents, noise, timesteps).astype(objective.dtype)
    prediction = model.transformer(
        noisy, model.encode_text(text, objective.dtype), timesteps, reference=reference,
        reference_index=reference_index, adaln_lora=objective.adaln_lora,
    )  # fmt: skip
    target = objective.schedule.velocity(latents, noise, timesteps)
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target))


def draw_timesteps(key: Key[Array, ""], batch: int, objective: Objective) -> Int[Array, " b"]:
    """Training timesteps 0..T-1: uniform, or floor(T · sigmoid(N(mean, std)))."""
    count = objective.schedule.config.num_train_timesteps
    if objective.timesteps == "uniform":
        return jax.random.randint(key, (batch,), 0, count)
    logits = objective.logit_mean + objective.logit_std * jax.random.normal(key, (batch,), jnp.float32)
    return jnp.minimum(jnp.floor(count * jax.nn.sigmoid(logits)).astype(jnp.int32), count - 1)


def draw_latents(batch: Batch, key: Key[Array, ""], objective: Objective) -> Float[Array, "b t h w c"]:
    """A sample of the VAE's posterior of what is denoised, scaled."""
    return _posterior(batch["mean"], batch["logvar"], key, objective)


def draw_reference(batch: Batch, key: Key[Array, ""], objective: Objective) -> Float[Array, "b 1 h w c"]:
    """One of each example's k reference frames or views, uniformly, as a sample of its posterior, scaled."""
    choice_key, sample_key = jax.random.split(key)
    count, views = batch["reference_mean"].shape[:2]
    choice = jax.random.randint(choice_key, (count, 1, 1, 1, 1), 0, views)
    mean, logvar = (jnp.take_along_axis(batch[name], choice, axis=1) for name in ("reference_mean", "reference_logvar"))
    return _posterior(mean, logvar, sample_key, objective)


def draw_text(batch: Batch, empty_text: Array, key: Key[Array, ""], objective: Objective) -> Array:
    """The captions, each replaced by the empty prompt with probability `text_dropout`, for guidance to stand on."""
    text = batch["text"]
    dropped = jax.random.bernoulli(key, objective.text_dropout, (text.shape[0],) + (1,) * (text.ndim - 1))
    return jnp.where(dropped, empty_text, text)


def _posterior(mean: Array, logvar: Array, key: Key[Array, ""], objective: Objective) -> Array:
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return references.sample_latents(mean, logvar, objective.scaling_factor, key)
