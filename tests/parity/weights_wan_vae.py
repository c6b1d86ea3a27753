"""diffusers' Wan VAE with random weights, and ours with the same ones, mapped by name without the converter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from sdv_jax.models.wan.vae import VAE, VAEConfig

_NAMES = (
    (r"\.gamma$", ".scale"),
    (r"\.weight$", ".kernel"),
    (r"\.resample\.1\.", ".resample."),
    (r"\.upsamplers\.0\.", ".upsampler."),
)


def our_name(name: str) -> str:
    """The path of a diffusers parameter in our module."""
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return name


def our_value(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Kernels [out, in, ...] become [..., in, out], those of the attention matrices; the rest becomes vectors."""
    array = tensor.detach().float().numpy()
    if not name.endswith(".weight"):
        return array.reshape(-1)
    array = np.moveaxis(array, (0, 1), (-1, -2))
    return array[0, 0] if ".attentions." in name else array


def make_pair(config: dict, seed: int = 0) -> tuple[AutoencoderKLWan, VAE]:
    """(diffusers' model, ours) with equal float32 weights; norms and biases are random too."""
    torch.manual_seed(seed)
    theirs = AutoencoderKLWan(**config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith((".gamma", ".bias")):
                parameter.copy_(0.2 * torch.randn_like(parameter) + (1.0 if name.endswith(".gamma") else 0.0))
    graph, state = nnx.split(nnx.eval_shape(lambda: VAE(VAEConfig(**config), rngs=nnx.Rngs(0))))
    values = {our_name(name): our_value(name, parameter) for name, parameter in theirs.state_dict().items()}
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

    # Compiling takes most of the time of such a test, and twice as long with optimisation.
    step = jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})
    return step(jax.tree.map(lambda a: a.astype(dtype), state), jnp.asarray(x, dtype))
