"""The CogVideoX family: causal 3-D VAE, T5 text encoder, diffusion transformer.

The contract of a family: `VARIANTS` (name -> config), `build` (config -> transformer), `SHARDING` (path table) and
`LORA_TARGETS`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from sdv_jax.models.cogvideox.vae import VAEConfig
from sdv_jax.models.text.t5 import T5Config


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """The sizes of one checkpoint. Solver settings are not of the architecture: they are data that lies beside it."""

    transformer: TransformerConfig
    vae: VAEConfig
    text_encoder: T5Config


_T5_XXL = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

_2B = TransformerConfig(num_attention_heads=30, num_layers=30)
_5B = TransformerConfig(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
_5B_I2V = dataclasses.replace(_5B, in_channels=32, use_learned_positional_embeddings=True)
_1_5 = dataclasses.replace(
    _5B, patch_size_t=2, patch_bias=False, sample_height=96, sample_width=170, sample_frames=81
)
_1_5_I2V = dataclasses.replace(_1_5, in_channels=32, ofs_embed_dim=512)

_VAE = VAEConfig(scaling_factor=0.7)
_VAE_1_5 = dataclasses.replace(_VAE, invert_scale_latents=True)

VARIANTS = {
    "CogVideoX-2b": CogVideoXConfig(_2B, VAEConfig(scaling_factor=1.15258426), _T5_XXL),
    "CogVideoX-5b": CogVideoXConfig(_5B, _VAE, _T5_XXL),
    "CogVideoX-5b-I2V": CogVideoXConfig(_5B_I2V, _VAE, _T5_XXL),
    "CogVideoX1.5-5B": CogVideoXConfig(_1_5, _VAE_1_5, _T5_XXL),
    "CogVideoX1.5-5B-I2V": CogVideoXConfig(_1_5_I2V, _VAE_1_5, _T5_XXL),
}

# Paper A's list, in PEFT's sense: a module is hit when its name in the diffusers checkpoint equals an entry or ends in
# "." + entry, so that "proj" hits patch_embed.proj and every ff.net.0.proj too.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2")

# FSDP: each block matrix is cut along its input axis, and so are the text's and the output's; learned positions are cut
# along their width; vectors and the small matrices outside the blocks are replicated.
SHARDING = (
    (r"^blocks\..*\.lora\.a$", jax.P(None, "fsdp", None)),
    (r"^blocks\..*\.lora\.b$", jax.P(None, None, "fsdp")),
    (r"\.lora\.(a|b)$", jax.P()),
    (r"^blocks\..*\.kernel$", jax.P(None, "fsdp", None)),
    (r"^patch_embed\.pos_embedding$", jax.P(None, "fsdp")),
    (r"^(patch_embed\.text_proj|norm_out\.linear|proj_out)\.kernel$", jax.P("fsdp", None)),
    (r"^(blocks|patch_embed|time_embedding|ofs_embedding|norm_final|norm_out|proj_out)\.", jax.P()),
)


def build(config: CogVideoXConfig, *, dtype=jnp.float32, rngs: nnx.Rngs) -> Transformer:
    """The family's denoiser with fresh weights."""
    return Transformer(config.transformer, dtype=dtype, rngs=rngs)
