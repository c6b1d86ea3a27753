"""The Wan family: causal 3-D VAE (2.1 or 2.2), UMT5 text encoder, diffusion transformer (A14B: two of them).

The contract of a family: `VARIANTS` (name -> config), `build` (config -> transformer), `SHARDING` (path table) and
`LORA_TARGETS`; `family.py` binds them to checkpoints, pipeline and training.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.models.text.umt5 import UMT5Config
from sdv_jax.models.wan.transformer import Transformer, TransformerConfig
from sdv_jax.models.wan.vae import VAEConfig
from sdv_jax.models.wan.vae22 import VAE22


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """The sizes of one checkpoint; `transformer_2` is the low-noise expert, where there are two."""

    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    transformer_2: TransformerConfig | None = None


_UMT5_XXL = UMT5Config()
_VAE21 = VAEConfig()
_1B = TransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
_5B = TransformerConfig(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48)
_14B = TransformerConfig()

VARIANTS = {
    "Wan2.1-T2V-1.3B": WanConfig(_1B, _VAE21, _UMT5_XXL),
    "Wan2.1-T2V-14B": WanConfig(_14B, _VAE21, _UMT5_XXL),
    "Wan2.2-TI2V-5B": WanConfig(_5B, VAE22, _UMT5_XXL),
    "Wan2.2-T2V-A14B": WanConfig(_14B, _VAE21, _UMT5_XXL, _14B),
}

# q, k, v and o of self- and cross-attention, and both feed-forward layers; diffusers' names, in PEFT's sense.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

# FSDP: each block matrix is cut along its input axis; vectors and the small matrices outside the blocks are replicated.
SHARDING = (
    (r"^blocks\..*\.lora\.a$", jax.P(None, "fsdp", None)),
    (r"^blocks\..*\.lora\.b$", jax.P(None, None, "fsdp")),
    (r"\.lora\.(a|b)$", jax.P()),
    (r"^blocks\..*\.kernel$", jax.P(None, "fsdp", None)),
    (r"^condition_embedder\..*\.kernel$", jax.P("fsdp", None)),
    (r"^(proj_out|patch_embedding)\.kernel$", jax.P()),
    (r"^(blocks|condition_embedder|patch_embedding|proj_out|scale_shift_table)\b", jax.P()),
)


def build(config: WanConfig, *, dtype=jnp.float32, rngs: nnx.Rngs) -> Transformer:
    """The family's denoiser with fresh weights; of two experts, either."""
    return Transformer(config.transformer, dtype=dtype, rngs=rngs)
