"""A converted model against the library it came from: each component of both, run on the same random inputs in float32.

The only module of the package that runs torch; torch, diffusers and transformers are what `pip install 'sdv_jax[test]'`
brings.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.checkpoints import diffusers_folder, model_folder
from sdv_jax.checkpoints.safetensors_io import variant_of, weights_file
from sdv_jax.errors import UserError

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """One comparison: the largest absolute difference, and that over the largest magnitude of the original's output."""

    part: str
    maximum: float
    relative: float


def verify(
    src: str | os.PathLike, model: str | os.PathLike, *, tolerance: float = TOLERANCE, seed: int = 0
) -> list[Row]:
    """Compares the converted folder `model` with the diffusers pipeline `src`; prints a table and returns its rows.

    Both models are held in float32, one component at a time. Weights that conversion narrowed are narrowed in the
    original too, so that what is compared is the computation. Raises UserError if a relative error exceeds `tolerance`,
    and where torch or diffusers is not installed.
    """
    require_torch()
    src, model = diffusers_folder.locate(src), Path(model)
    config = model_folder.read_config(model)
    rows = []
    print(f"{'component':<20} {'max error':>10} {'relative':>10}")
    for name, compare in (("transformer", _transformer), ("vae", _vae), ("text_encoder", _text_encoder)):
        theirs = _load_torch(src, name, config)
        ours = model_folder.load_component(model, name, "float32")
        for part, mine, other in compare(ours, theirs, np.random.default_rng(seed)):
            rows.append(_row(part, mine, other))
            print(f"{part:<20} {rows[-1].maximum:>10.2e} {rows[-1].relative:>10.2e}", flush=True)
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


def _load_torch(folder: Path, name: str, config: dict):
    import diffusers
    import torch
    import transformers

    library, kind = config["model_index"][name]
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
    model = cls.from_pretrained(folder / name, variant=variant_of(weights_file(folder / name).name))
    stored = getattr(torch, config.get("dtype", {}).get(name, ""), None)
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(stored if isinstance(stored, torch.dtype) else parameter.dtype).float()
    return model.eval()


def _run(module: nnx.Module, call, *inputs):
    graph, state = nnx.split(module)
    return jax.tree.map(
        np.asarray,
        jax.jit(lambda state, *inputs: call(nnx.merge(graph, state), *inputs))(state, *map(jnp.asarray, inputs)),
    )


def _transformer(ours, theirs, rng) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    c, frames, height, width = ours.config, 2, 4 * ours.config.patch_size, 6 * ours.config.patch_size
    latents = rng.standard_normal((1, frames, height, width, c.in_channels), np.float32)
    text = rng.standard_normal((1, c.max_text_seq_length, c.text_embed_dim), np.float32)
    steps = np.array([421], np.int32)
    rotary = (
        _rotary(c, frames, height // c.patch_size, width // c.patch_size)
        if c.use_rotary_positional_embeddings
        else None
    )
    other = theirs(
        _torch(np.moveaxis(latents, -1, 2)), _torch(text), _torch(steps), image_rotary_emb=rotary, return_dict=False
    )[0]
    yield "transformer", _run(ours, lambda m, *x: m(*x), latents, text, steps), np.moveaxis(other.numpy(), 2, -1)


def _rotary(c, frames: int, height: int, width: int):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    crop = get_resize_crop_region_for_grid(
        (height, width), c.sample_width // c.patch_size, c.sample_height // c.patch_size
    )
    return get_3d_rotary_pos_embed(c.attention_head_dim, crop, (height, width), frames)


def _vae(ours, theirs, rng) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    c, scale = ours.config, ours.config.spatial_compression
    video = rng.uniform(-1, 1, (1, 9, 4 * scale, 6 * scale, c.in_channels)).astype(np.float32)
    posterior = theirs.encode(_torch(np.moveaxis(video, -1, 1))).latent_dist
    moments = np.concatenate([np.moveaxis(part.numpy(), 1, -1) for part in (posterior.mean, posterior.logvar)], -1)
    yield "vae encode", np.concatenate(_run(ours, lambda m, x: m.encode(x), video), -1), moments
    latents = rng.standard_normal((1, 3, 4, 6, c.latent_channels), np.float32)
    other = theirs.decode(_torch(np.moveaxis(latents, -1, 1)), return_dict=False)[0]
    yield "vae decode", _run(ours, lambda m, x: m.decode(x), latents), np.moveaxis(other.numpy(), 1, -1)


def _text_encoder(ours, theirs, rng) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    ids = rng.integers(0, ours.config.vocab_size, (1, 24)).astype(np.int32)
    yield "text encoder", _run(ours, lambda m, x: m(x), ids), theirs(_torch(ids).long())[0].numpy()


def _torch(array: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _row(part: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    if ours.shape != theirs.shape:
        raise UserError(f"{part}: output has shape {ours.shape}, the original's {theirs.shape}")
    maximum = float(np.abs(ours - theirs).max())
    return Row(part, maximum, maximum / max(float(np.abs(theirs).max()), 1e-30))
