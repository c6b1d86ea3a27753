"""A transformer of a few thousand parameters, every one of them random, for tests of what surrounds it."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.models.cogvideox import rules as cogvideox
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
    num_layers=3, sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=5,
    use_rotary_positional_embeddings=True,
)  # fmt: skip
NAMES = cogvideox.transformer(CONFIG.patch_size).to_torch_module_name


def make(config: TransformerConfig = CONFIG, *, seed: int = 0) -> Transformer:
    """The model; norms and biases are random too."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    key = jax.random.key(seed)
    for index, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.Param))):
        leaf[...] += 0.1 * jax.random.normal(jax.random.fold_in(key, index), leaf.shape)
    return model


def fill_adapter(model: Transformer, *, seed: int = 0) -> None:
    """B of every adapter, which starts at zero, becomes random."""
    key = jax.random.key(seed)
    for index, (path, leaf) in enumerate(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))):
        if path[-1] == "b":
            leaf[...] = 0.3 * jax.random.normal(jax.random.fold_in(key, index), leaf.shape)


def inputs(config: TransformerConfig = CONFIG, *, references: int = 0, seed: int = 0) -> tuple:
    """(latents, text, timesteps, reference latents or None) for a batch of two."""
    keys = jax.random.split(jax.random.key(seed), 3)
    h, w, c = config.sample_height, config.sample_width, config.in_channels
    latents = jax.random.normal(keys[0], (2, 2, h, w, c))
    text = jax.random.normal(keys[1], (2, config.max_text_seq_length, config.text_embed_dim))
    reference = jax.random.normal(keys[2], (2, references, h, w, c)) if references else None
    return latents, text, jnp.array([3, 700]), reference


@jax.jit
def run(model: Transformer, inputs: tuple, index=None) -> jax.Array:
    """One forward pass. Modules are pytrees, so that the model is an ordinary argument."""
    latents, text, timesteps, reference = inputs
    return model(latents, text, timesteps, reference=reference, reference_index=index)
