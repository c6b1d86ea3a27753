"""The toy family of docs/adding_a_model.md: one linear map for a VAE, T5, and a few blocks over patches."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.models.text.t5 import T5Config
from tests.toy_family.transformer import Transformer, TransformerConfig
from tests.toy_family.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """The sizes of one checkpoint."""

    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: T5Config


VARIANTS = {
    "Toy-1": ToyConfig(
        TransformerConfig(),
        VAEConfig(),
        T5Config(vocab_size=256, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4),
    )
}

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out", "up", "down")

SHARDING = (
    (r"\.lora\.(a|b)$", jax.P()),
    (r"^blocks\..*\.kernel$", jax.P(None, "fsdp", None)),
    (r"^(blocks|patch_embed|text_embed|time_embed|norm_out|proj_out)\.", jax.P()),
)


def build(config: ToyConfig, *, dtype=jnp.float32, rngs: nnx.Rngs) -> Transformer:
    """The denoiser with fresh weights."""
    return Transformer(config.transformer, dtype=dtype, rngs=rngs)
