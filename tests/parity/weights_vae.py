"""diffusers' CogVideoX VAE with random weights, and ours with the same ones, mapped by name without the converter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from flax import nnx

from sdv_jax.models.cogvideox.vae import VAE, VAEConfig

_CAUSAL = re.compile(r"(conv_in|conv_out|conv1|conv2|conv_y|conv_b)\.conv\.")
_NORM = re.compile(r"(norm1|norm2|norm_out|norm_layer)\.weight$")


def our_name(name: str) -> str:
    """The path of a diffusers parameter in our module."""
    name = _CAUSAL.sub(r"\1.", name)
    name = _NORM.sub(r"\1.scale", name)
    return re.sub(r"\.weight$", ".kernel", name)


def our_value(tensor: torch.Tensor) -> np.ndarray:
    """Kernels [out, in, ...] become [..., in, out]; vectors stay."""
    array = tensor.detach().float().numpy()
    return array if array.ndim == 1 else np.moveaxis(array, (0, 1), (-1, -2))


def make_pair(config: dict, seed: int = 0) -> tuple[AutoencoderKLCogVideoX, VAE]:
    """(diffusers' model, ours) with equal float32 weights; norms and biases are random too."""
    torch.manual_seed(seed)
    theirs = AutoencoderKLCogVideoX(**config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter) + (1.0 if name.endswith("weight") else 0.0))
    ours = nnx.eval_shape(lambda: VAE(VAEConfig(**config), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(ours)
    values = {our_name(name): our_value(parameter) for name, parameter in theirs.state_dict().items()}
    flat = nnx.to_flat_state(state)
    paths = {".".join(map(str, path)): variable.shape for path, variable in flat}
    assert paths == {name: value.shape for name, value in values.items()}
    state = nnx.from_flat_state([(p, v.replace(jnp.asarray(values[".".join(map(str, p))]))) for p, v in flat])
    return theirs, nnx.merge(graph, state)


def run(model: VAE, method: str, x, *, dtype=jnp.float32, **kwargs):
    """One jitted call of `encode` or `decode` on numpy [b, t, h, w, c], with weights and input in `dtype`."""
    graph, state = nnx.split(model)

    def call(state, x):
        return getattr(nnx.merge(graph, state), method)(x, **kwargs)

    return jax.jit(call)(jax.tree.map(lambda a: a.astype(dtype), state), jnp.asarray(x, dtype))


def encode_theirs(model, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' (mean, log variance), channels-last float32, computed in the model's dtype."""
    with torch.no_grad():
        posterior = model.encode(_first(video, model.dtype)).latent_dist
    return _last(posterior.mean), _last(posterior.logvar)


def decode_theirs(model, latents: np.ndarray) -> np.ndarray:
    """diffusers' video, channels-last float32, computed in the model's dtype."""
    with torch.no_grad():
        return _last(model.decode(_first(latents, model.dtype)).sample)


def _first(x: np.ndarray, dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(dtype)


def _last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.float().numpy(), 1, -1)
