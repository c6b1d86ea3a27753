"""An autoencoder of one linear map each way: a square of pixels becomes one latent, frame by frame."""

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from sdv_jax.models.config_check import check_numbers
from sdv_jax.nn.linear import Linear
from sdv_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The keys of vae/config.json."""

    latent_channels: int = 4
    spatial_compression: int = 4
    scaling_factor: float = 0.5

    def __post_init__(self):
        check_numbers("vae config", self)


class VAE(nnx.Module):
    """Neither scales nor normalises: what the transformer sees of a latent is the family's `Traits.latents`."""

    tiling = None  # what `tiling=True` stands for; this one needs none

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        pixels = 3 * config.spatial_compression**2
        self.encoder = Linear(pixels, 2 * config.latent_channels, dtype=dtype, rngs=rngs)
        self.decoder = Linear(config.latent_channels, pixels, dtype=dtype, rngs=rngs)

    def encode(self, video: Float[Array, "b t h w 3"], *,
               tiling=None) -> tuple[Float[Array, "b t i j c"], Float[Array, "b t i j c"]]:
        """(mean, logvar) of the posterior."""
        s = self.config.spatial_compression
        x = self.encoder(rearrange(video, "b t (i p) (j q) c -> b t i j (p q c)", p=s, q=s))
        mean, logvar = jnp.split(x, 2, axis=-1)
        return mean, logvar

    def decode(self, latents: Float[Array, "b t i j c"], *, tiling=None) -> Float[Array, "b t h w 3"]:
        """Video in [-1, 1]."""
        s = self.config.spatial_compression
        return rearrange(self.decoder(latents), "b t i j (p q c) -> b t (i p) (j q) c", p=s, q=s)
