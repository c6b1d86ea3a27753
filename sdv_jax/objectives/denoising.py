"""What every objective shares: model and text encoder, draws of latents, captions and timesteps, the loss.

The loss is the mean squared error of what the network predicts: v in CogVideoX, the flow eps - x0 in Wan. CogVideoX's
published loss is mean(w · (x0_hat - x0)²) with w = 1 / (1 - abar_t). Under v-prediction
x0_hat - x0 = -sqrt(1 - abar_t) · (v_hat - v), so that loss equals the plain mean((v_hat - v)²).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.adapters.reference import draw_distinct
from sdv_jax.diffusion import AnySchedule, draw_timesteps
from sdv_jax.models.contract import Geometry, LatentScale
from sdv_jax.models.text.encode import encode
from sdv_jax.nn.rearrange import by_example
from sdv_jax.sharding import like
from sdv_jax.typing import Array, Float, Int, Key

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


class Denoiser(nnx.Module):
    """A transformer and, where batches carry token ids, the text encoder that turns them into embeddings.

    `text_masked` is the family's way with padding, see `contract.Traits`.
    """

    def __init__(self, transformer: nnx.Module, text_encoder: nnx.Module | None = None, *, text_masked: bool = False):
        self.transformer = transformer
        self.text_encoder = nnx.data(text_encoder)
        self.text_masked = text_masked

    def encode_text(self, text: Float[Array, "b s e"] | Int[Array, "b s"], dtype) -> Float[Array, "b s e"]:
        """Embeddings as they are, token ids through the encoder."""
        embeddings = text if text.ndim == 3 else encode(self.text_encoder, text, masked=self.text_masked)
        return embeddings.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Fixed over a run.

    `image_latents` and `clamps_image` say how the model takes a first frame, see `contract.Traits`; `options` are
    further keywords of the transformer's call (`Family.options`), as pairs; `shift` is that of the timestep law, None
    for the scheduler's own; `dtype` is that of the activations, the loss is float32.
    """

    schedule: AnySchedule
    latents: LatentScale
    geometry: Geometry
    image_latents: LatentScale | None = None
    clamps_image: bool = False
    text_dropout: float = 0.0
    timesteps: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | None = None
    options: tuple[tuple[str, object], ...] = ()
    dtype: jnp.dtype = jnp.float32

    def without_dropout(self) -> "Objective":
        """The same with every caption kept, for measuring."""
        return dataclasses.replace(self, text_dropout=0.0)


def loss(
    model: Denoiser, latents: Float[Array, "b t h w c"], text: Float[Array, "b s e"] | Int[Array, "b s"],
    key: Key[Array, ""], *, objective: Objective, reference: Float[Array, "b k h w c"] | None = None,
    reference_index: Int[Array, "b r"] | None = None, first_frame: bool = False,
    timesteps: Int[Array, " b"] | Float[Array, " b"] | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """Mean squared error of the prediction for `latents` (in the transformer's scale), noised at drawn timesteps, or at
    the given ones.

    With `first_frame` the model is given the clip's own first latent frame; where that frame then stays clean among the
    latents (`clamps_image`), nothing is to be predicted for it.
    """
    o = objective
    noise_key, time_key = jax.random.split(key)
    noise = like(jax.random.normal(noise_key, latents.shape, jnp.float32), latents)
    if timesteps is None:
        timesteps = draw_timesteps(
            time_key, latents.shape[0], schedule=o.schedule, law=o.timesteps, logit_mean=o.logit_mean,
            logit_std=o.logit_std, shift=o.shift,
        )  # fmt: skip
    noisy = o.schedule.add_noise(latents, noise, timesteps).astype(o.dtype)
    prediction = model.transformer(
        noisy, model.encode_text(text, o.dtype), timesteps, reference=reference, reference_index=reference_index,
        **dict(o.options), **_image(latents, o, first_frame),
    )  # fmt: skip
    errors = jnp.square(prediction.astype(jnp.float32) - o.schedule.target(latents, noise, timesteps))
    return jnp.mean(errors[:, 1:] if first_frame and o.clamps_image else errors)


def _image(latents: Float[Array, "b t h w c"], objective: Objective, first_frame: bool) -> dict[str, Array]:
    """The keyword that hands the first latent frame, which the causal VAE makes of the first picture alone, to a model
    that takes one.
    """
    if not first_frame:
        return {}
    return {"image": objective.image_latents.to_model(objective.latents.to_vae(latents[:, :1])).astype(objective.dtype)}


def draw_latents(batch: Batch, key: Key[Array, ""], objective: Objective) -> Float[Array, "b t h w c"]:
    """A sample of the VAE's posterior of what is denoised, scaled."""
    return _posterior(batch["mean"], batch["logvar"], key, objective)


def draw_references(
    batch: Batch, key: Key[Array, ""], objective: Objective, count: int = 1, *, first: bool = False
) -> Float[Array, "b k h w c"]:
    """`count` different ones of each example's reference frames or views, uniformly, in drawn order, or the `first`
    ones, as samples of their posteriors, scaled.
    """
    choice_key, sample_key = jax.random.split(key)
    rows, views = batch["reference_mean"].shape[:2]
    drawn = draw_distinct(choice_key, rows, views, count)
    choice = (jnp.broadcast_to(jnp.arange(count), drawn.shape) if first else drawn)[..., None, None, None]
    moments = (batch["reference_mean"], batch["reference_logvar"])
    mean, logvar = (by_example(partial(jnp.take_along_axis, axis=1), moment, choice) for moment in moments)
    return _posterior(mean, logvar, sample_key, objective)


def draw_text(batch: Batch, empty_text: Array, key: Key[Array, ""], objective: Objective) -> Array:
    """The captions, each replaced by the empty prompt with probability `text_dropout`, for guidance to stand on."""
    text = batch["text"]
    dropped = jax.random.bernoulli(key, objective.text_dropout, (text.shape[0],) + (1,) * (text.ndim - 1))
    return jnp.where(like(dropped, text), empty_text, text)


def _posterior(mean: Array, logvar: Array, key: Key[Array, ""], objective: Objective) -> Array:
    return objective.latents.draw(mean.astype(jnp.float32), logvar.astype(jnp.float32), key)
