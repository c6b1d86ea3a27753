"""The toy in torch, for `sdv convert --verify`. A family whose classes are in diffusers needs `comparisons` only."""

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from einops import rearrange
from torch import nn

from sdv_jax.checkpoints.verify import Comparison, torch_of, vae_comparisons
from sdv_jax.nn.embeddings import sincos_3d


class ToyTransformer(ModelMixin, ConfigMixin):
    """Channels-first, as diffusers has it; without references."""

    @register_to_config
    def __init__(self, in_channels: int, patch_size: int, num_layers: int, num_heads: int, width: int, text_dim: int):
        super().__init__()
        self.patch_embed = nn.Linear(patch_size**2 * in_channels, width)
        self.text_embed = nn.Linear(text_dim, width)
        self.time_embed = TimestepEmbedding(width, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, eps=1e-6)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)

    def forward(self, latents, text, timesteps):
        p, width = self.config.patch_size, self.config.width
        x = rearrange(latents, "b c t (h p) (w q) -> b t h w (p q c)", p=p, q=p)
        t, h, w = x.shape[1:4]
        places = torch_of(np.array(sincos_3d(*(np.arange(n) for n in (t, h, w)), width)))
        x = torch.cat([self.text_embed(text), self.patch_embed(x.flatten(1, 3)) + places], dim=1)
        time = get_timestep_embedding(timesteps, width, flip_sin_to_cos=True, downscale_freq_shift=0)
        x = x + self.time_embed(time)[:, None]
        for layer in self.layers:
            x = layer(x)
        x = self.proj_out(self.norm_out(x[:, text.shape[1] :]))
        return rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", h=h, w=w, p=p, q=p)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (rearrange(f(y), "b n (m k) -> b m n k", m=self.heads) for f in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ToyAutoencoder(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, latent_channels: int, spatial_compression: int, scaling_factor: float):
        super().__init__()
        self.encoder = nn.Linear(3 * spatial_compression**2, 2 * latent_channels)
        self.decoder = nn.Linear(latent_channels, 3 * spatial_compression**2)

    def encode(self, video):
        s = self.config.spatial_compression
        x = self.encoder(rearrange(video, "b c t (i p) (j q) -> b t i j (p q c)", p=s, q=s))
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(x.movedim(-1, 1)))

    def decode(self, latents, return_dict=True):
        s = self.config.spatial_compression
        x = self.decoder(latents.movedim(1, -1))
        return (rearrange(x, "b t i j (p q c) -> b c t (i p) (j q)", p=s, q=s),)


def comparisons(name: str, ours, theirs, rng: np.random.Generator) -> list[Comparison]:
    """What to compare of component `name`: `ours` is our config, `theirs` the torch model."""
    if name == "vae":
        return vae_comparisons(ours, theirs, rng)
    if name == "text_encoder":
        ids = rng.integers(0, ours.vocab_size, (1, 12)).astype(np.int32)
        return [Comparison("text encoder", lambda m, x: m(x), (ids,), theirs(torch_of(ids).long())[0].numpy())]
    latents = rng.standard_normal((1, 3, 4, 6, ours.in_channels), np.float32)
    text, time = rng.standard_normal((1, 12, ours.text_dim), np.float32), np.array([421.0], np.float32)
    found = theirs(torch_of(np.moveaxis(latents, -1, 1)), torch_of(text), torch_of(time))
    return [
        Comparison("transformer", lambda m, *x: m(*x), (latents, text, time), np.moveaxis(found.numpy(), 1, -1))
    ]
