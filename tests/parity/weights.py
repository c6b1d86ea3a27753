"""diffusers' CogVideoX transformer on random weights, and ours with the same ones, moved by the conversion rules."""

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from flax import nnx

from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of, match
from sdv_jax.checkpoints.safetensors_io import Tensor
from sdv_jax.models.cogvideox import rules
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig

TINY = {
    "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 24,
    "text_embed_dim": 20, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 7,
}  # fmt: skip


def transformer_pair(seed: int = 0, **config) -> tuple[CogVideoXTransformer3DModel, Transformer]:
    """(diffusers' model, ours), float32, `config` over `TINY`."""
    theirs = CogVideoXTransformer3DModel(**TINY | config).eval()
    randomise(theirs, seed)
    return theirs, from_torch(theirs, TransformerConfig(**TINY | config))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random: fresh norms and biases would hide mistakes, and so would nearly uniform attention.

    Learned positions are random too, those of the text included; sin-cos ones are no weights and stay.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        if "patch_embed.pos_embedding" in model.state_dict():
            model.patch_embed.pos_embedding.normal_(std=0.5)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(
                    mean=1.0 if "norm" in name and name.endswith(".weight") and "linear" not in name else 0.0, std=0.3
                )


def from_torch(theirs: torch.nn.Module, config: TransformerConfig, dtype=jnp.float32) -> Transformer:
    """Our transformer with the weights of a diffusers one, through the rule table and the strict engine."""
    table = rules.of_transformer(config)
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=nnx.Rngs(0)))
    tensors = {name: _InMemory.of(name, value) for name, value in theirs.state_dict().items()}
    source = match(tensors, leaves_of(leaf_shapes(nnx.state(model)), table), table, where="memory")
    leaves = {leaf.path: leaf for leaf in source.leaves}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        leaf = leaves[".".join(path)]
        variable.set_value(
            jnp.asarray(source.read(leaf, tuple(slice(0, n) for n in leaf.shape), np.dtype(np.float32)), dtype)
        )
    return model


@dataclass(frozen=True)
class _InMemory(Tensor):
    """A tensor that needs no file."""

    value: np.ndarray = None

    @classmethod
    def of(cls, name: str, value: torch.Tensor) -> "_InMemory":
        array = value.detach().float().numpy()
        return cls(Path("memory"), name, array.dtype, array.shape, 0, array)

    def read(self, rows=None, *, buffers=None) -> np.ndarray:
        return self.value if rows is None else self.value[rows]


@functools.partial(jax.jit, static_argnames=("graph", "adaln_lora"))
def _run(state, latents, text, timesteps, reference, index, image, *, graph, adaln_lora):
    model = nnx.merge(graph, state)
    return model(
        latents, text, timesteps, reference=reference, reference_index=index, image=image, adaln_lora=adaln_lora
    )


def run_ours(
    model: Transformer, latents, text, timesteps, reference=None, index=None, *, image=None, adaln_lora="all",
    dtype=jnp.float32,
) -> np.ndarray:  # fmt: skip
    """One jitted call on numpy inputs [b, t, h, w, c]; the result as float32."""
    graph, state = nnx.split(model)
    latents, text, reference, image = (
        None if x is None else jnp.asarray(x, dtype) for x in (latents, text, reference, image)
    )
    index, timesteps = None if index is None else jnp.asarray(index), jnp.asarray(timesteps)
    out = _run(state, latents, text, timesteps, reference, index, image, graph=graph, adaln_lora=adaln_lora)
    assert out.dtype == dtype
    return np.asarray(out, np.float32)


def inputs(config, *, frames: int, height: int, width: int, batch: int = 2, references: int = 0, seed: int = 0):
    """Random (latents, text, timesteps), and reference latents if there are any, as numpy; `frames` are latent ones."""
    rng = np.random.default_rng(seed)
    c = config.latent_channels
    latents = rng.standard_normal((batch, frames, height, width, c)).astype(np.float32)
    text = rng.standard_normal((batch, config.max_text_seq_length, config.text_embed_dim)).astype(np.float32)
    timesteps = rng.integers(0, 1000, batch)
    if not references:
        return latents, text, timesteps
    return latents, text, timesteps, rng.standard_normal((batch, references, height, width, c)).astype(np.float32)


def rotary(theirs: CogVideoXTransformer3DModel, frames: int, height: int, width: int):
    """The table (cos, sin) that diffusers' pipeline hands its transformer for latents of that size, or None."""
    if not theirs.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(transformer=theirs, vae_scale_factor_spatial=1)
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, height, width, frames, "cpu")


def run_theirs(model: CogVideoXTransformer3DModel, latents, text, timesteps, *, image=None) -> np.ndarray:
    """diffusers' own forward pass on the same inputs, in the model's dtype; the result [b, t, h, w, c] as float32.

    A model with channels for an image gets them as diffusers' image-to-video pipeline makes them, or zeros.
    """
    latents, text = (torch.from_numpy(x).to(model.dtype) for x in (latents, text))
    table = rotary(model, *latents.shape[1:4])
    if model.config.in_channels == 2 * model.config.out_channels:
        given = torch.zeros_like(latents)
        if image is not None:
            given[:, :1] = torch.from_numpy(image).to(model.dtype)
        latents = torch.cat([latents, given], dim=-1)
    ofs = None if model.config.ofs_embed_dim is None else latents.new_full((1,), fill_value=2.0)
    with torch.no_grad():
        out = model(
            latents.permute(0, 1, 4, 2, 3), text, torch.as_tensor(timesteps), ofs=ofs, image_rotary_emb=table
        ).sample
    return out.permute(0, 1, 3, 4, 2).float().numpy()
