"""A converted model against the library it came from: each component of both, run on the same random inputs in float32.

The only module of the package that runs torch; torch, diffusers and transformers are what `pip install 'sdv_jax[test]'`
brings.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.checkpoints import diffusers_folder, model_folder, original_wan
from sdv_jax.checkpoints.safetensors_io import variant_of, weights_file
from sdv_jax.errors import UserError

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """One comparison: the largest absolute difference, and that over the largest magnitude of the original's output."""

    part: str
    maximum: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """One thing to compare: `call(our module, *inputs)` should be `expected`. Inputs may be None."""

    part: str
    call: Callable
    inputs: tuple[np.ndarray | None, ...]
    expected: np.ndarray


def verify(
    src: str | os.PathLike, model: str | os.PathLike, *, tolerance: float = TOLERANCE, seed: int = 0
) -> list[Row]:
    """Compares the converted folder `model` with `src` as diffusers runs it; prints a table and returns its rows.

    `src` is a diffusers pipeline, or an original release of Wan: its tensors then go into diffusers' classes under the
    names that conversion gives them. Both models are held in float32, one component at a time. Weights that conversion
    narrowed are narrowed in the original too, so that what is compared is the computation. Raises UserError if a
    relative error exceeds `tolerance`, and where torch or diffusers is not installed.
    """
    require_torch()
    src, model = diffusers_folder.locate(src), Path(model)
    about = model_folder.about(model)
    peer = import_module(about.family.peer)
    rows = []
    print(f"{'component':<20} {'max error':>10} {'relative':>10}")
    for name, config in about.configs.items():
        theirs = _load_torch(src, name, about, peer)
        ours = model_folder.load_component(model, name, "float32")
        for row in peer.comparisons(name, config, theirs, np.random.default_rng(seed)):
            part = f"{row.part}, expert 2" if name == "transformer_2" else row.part
            rows.append(_row(part, _run(ours, row.call, *row.inputs), row.expected))
            print(f"{rows[-1].part:<20} {rows[-1].maximum:>10.2e} {rows[-1].relative:>10.2e}", flush=True)
        del theirs, ours
    if wrong := [row for row in rows if not row.relative <= tolerance]:  # NaN is wrong too
        found = ", ".join(f"{row.part} {row.relative:.1e}" for row in wrong)
        raise UserError(
            f"{src}: the converted model computes something else: relative error {found}, allowed {tolerance:.0e}"
        )
    return rows


def require_torch() -> None:
    """Raises UserError unless torch, diffusers and transformers' models can be imported."""
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
        from transformers import T5EncoderModel  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"verify needs torch, diffusers and transformers ({error}); pip install 'sdv_jax[test]'"
        ) from None


def _load_torch(folder: Path, name: str, about: model_folder.About, peer: ModuleType):
    """The component as its own library loads it; a class that diffusers lacks is the peer's."""
    import diffusers
    import torch
    import transformers

    library, kind = about.raw["model_index"][name]
    cls = getattr(peer, kind, None) or getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    if original_wan.recognises(folder):
        model = _load_original(folder, name, about, cls)
    else:
        model = cls.from_pretrained(folder / name, variant=variant_of(weights_file(folder / name).name))
    stored = getattr(torch, about.raw.get("dtype", {}).get(name, ""), None)
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(stored if isinstance(stored, torch.dtype) else parameter.dtype).float()
    return model.eval()


def _load_original(folder: Path, name: str, about: model_folder.About, cls: type):
    """The component of an original release in the torch class `cls`, of the config that conversion derived."""
    raw, component = about.raw["config"][name], about.family.components[name]
    source = original_wan.open_component(folder, about.family, name, raw)
    weights = {tensor: torch_of(found.read().astype(np.float32)) for tensor, found in source.tensors.items()}
    weights |= {alias: weights[tensor] for alias, tensor in component.rules(about.configs[name]).aliases.items()}
    model = cls.from_config(raw) if hasattr(cls, "from_config") else cls(cls.config_class(**raw))
    model.load_state_dict(weights)
    return model


def _run(module: nnx.Module, call: Callable, *inputs: np.ndarray | None) -> np.ndarray:
    graph, state = nnx.split(module)
    arrays = jax.tree.map(jnp.asarray, inputs)
    return np.asarray(jax.jit(lambda state, inputs: call(nnx.merge(graph, state), *inputs))(state, arrays))


# MARK: for the families' peers


def vae_comparisons(c, theirs, rng: np.random.Generator) -> list[Comparison]:
    """Encoding 9 frames and decoding 3 latent frames; every VAE here has the same interface, there and here."""
    scale = c.spatial_compression
    video = rng.uniform(-1, 1, (1, 9, 4 * scale, 6 * scale, 3)).astype(np.float32)
    posterior = theirs.encode(torch_of(np.moveaxis(video, -1, 1))).latent_dist
    moments = np.concatenate([channels_last(part, 1) for part in (posterior.mean, posterior.logvar)], -1)
    latents = rng.standard_normal((1, 3, 4, 6, c.latent_channels), np.float32)
    decoded = theirs.decode(torch_of(np.moveaxis(latents, -1, 1)), return_dict=False)[0]
    return [
        Comparison("vae encode", lambda m, x: jnp.concatenate(m.encode(x), -1), (video,), moments),
        Comparison("vae decode", lambda m, x: m.decode(x), (latents,), channels_last(decoded, 1)),
    ]


def torch_of(array: np.ndarray):
    """The array as a torch tensor."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def channels_last(tensor, axis: int) -> np.ndarray:
    """A torch tensor as an array whose `axis`, the channels, is the last one."""
    return np.moveaxis(tensor.numpy(), axis, -1)


def _row(part: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    if ours.shape != theirs.shape:
        raise UserError(f"{part}: output has shape {ours.shape}, the original's {theirs.shape}")
    maximum = float(np.abs(ours - theirs).max())
    return Row(part, maximum, maximum / max(float(np.abs(theirs).max()), 1e-30))
