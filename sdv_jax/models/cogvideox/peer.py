"""CogVideoX in torch beside ours, for `--verify`: the same random inputs through both, component by component.

Nothing here is imported unless a conversion is verified; torch and diffusers come with `pip install 'sdv_jax[test]'`.
"""

import numpy as np
import torch

from sdv_jax.checkpoints.verify import Comparison, channels_last, torch_of, vae_comparisons


def comparisons(name: str, ours, theirs, rng: np.random.Generator) -> list[Comparison]:
    """What to compare of component `name`: `ours` is our config, `theirs` the torch model."""
    return {"transformer": _transformer, "vae": vae_comparisons, "text_encoder": _text_encoder}[name](ours, theirs, rng)


def _transformer(c, theirs, rng) -> list[Comparison]:
    frames = 2
    height, width = (c.sample_height, c.sample_width) if c.use_learned_positional_embeddings else (
        4 * c.patch_size, 6 * c.patch_size)  # fmt: skip
    latents = rng.standard_normal((1, frames, height, width, c.latent_channels), np.float32)
    image = rng.standard_normal((1, 1, height, width, c.latent_channels), np.float32) if c.takes_image else None
    text = rng.standard_normal((1, c.max_text_seq_length, c.text_embed_dim), np.float32)
    steps = np.array([421], np.int32)
    seen = latents
    if c.takes_image:
        behind = np.zeros_like(latents[:, 1:])
        seen = np.concatenate([latents, np.concatenate([image, behind], axis=1)], axis=-1)
    found = theirs(
        torch_of(np.moveaxis(seen, -1, 2)), torch_of(text), torch_of(steps),
        ofs=None if c.ofs_embed_dim is None else torch.full((1,), 2.0),
        image_rotary_emb=_rotary(c, frames, height // c.patch_size, width // c.patch_size), return_dict=False,
    )[0]  # fmt: skip
    return [
        Comparison(
            "transformer", lambda m, x, s, t, i: m(x, s, t, image=i), (latents, text, steps, image),
            channels_last(found, 2),
        )
    ]  # fmt: skip


def _rotary(c, frames: int, height: int, width: int):
    """The table that diffusers' pipelines make."""
    if not c.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    trained = c.sample_width // c.patch_size, c.sample_height // c.patch_size
    if c.patch_size_t is None:
        crop = get_resize_crop_region_for_grid((height, width), *trained)
        return get_3d_rotary_pos_embed(c.attention_head_dim, crop, (height, width), frames)
    most = max(trained[1], height), max(trained[0], width)
    return get_3d_rotary_pos_embed(
        c.attention_head_dim, None, (height, width), -(-frames // c.patch_size_t), grid_type="slice", max_size=most
    )


def _text_encoder(c, theirs, rng) -> list[Comparison]:
    ids = rng.integers(0, c.vocab_size, (1, 24)).astype(np.int32)
    return [Comparison("text encoder", lambda m, x: m(x), (ids,), theirs(torch_of(ids).long())[0].numpy())]
