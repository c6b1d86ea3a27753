"""Wan in torch beside ours, for `--verify`: the same random inputs through both, component by component.

Nothing here is imported unless a conversion is verified; torch and diffusers come with `pip install 'sdv_jax[test]'`.
"""

import numpy as np

from sdv_jax.checkpoints.verify import Comparison, channels_last, torch_of, vae_comparisons
from sdv_jax.models.text.encode import PAD

_TEXT = 17  # tokens of the compared prompt; any number does


def comparisons(name: str, ours, theirs, rng: np.random.Generator) -> list[Comparison]:
    """What to compare of component `name`: `ours` is our config, `theirs` the torch model."""
    table = {"transformer": _transformer, "transformer_2": _transformer, "vae": vae_comparisons}
    return (table | {"text_encoder": _text_encoder})[name](ours, theirs, rng)


def _transformer(c, theirs, rng) -> list[Comparison]:
    """Text to video, and image to video with the first frame's tokens at t = 0."""
    t, h, w = (size * patch for size, patch in zip((3, 4, 6), c.patch_size, strict=True))
    latents = rng.standard_normal((1, t, h, w, c.in_channels), np.float32)
    text = rng.standard_normal((1, _TEXT, c.text_dim), np.float32)
    step = np.array([421.0], np.float32)
    each = np.full((1, 3 * 4 * 6), 421.0, np.float32)
    each[:, : 4 * 6] = 0
    found = [
        theirs(torch_of(np.moveaxis(latents, -1, 1)), torch_of(time), torch_of(text), return_dict=False)[0]
        for time in (step, each)
    ]
    rows = [Comparison("transformer", lambda m, *x: m(*x), (latents, text, step), channels_last(found[0], 1))]
    if c.patch_size[0] == 1:
        image = latents[:, :1]
        rows.append(
            Comparison(
                "first frame given", lambda m, x, s, t, i: m(x, s, t, image=i), (latents, text, step, image),
                channels_last(found[1], 1),
            )
        )  # fmt: skip
    return rows


def _text_encoder(c, theirs, rng) -> list[Comparison]:
    ids = rng.integers(1, c.vocab_size, (1, 24)).astype(np.int32)
    ids[:, 20:] = PAD
    mask = (ids != PAD).astype(np.int32)
    found = theirs(torch_of(ids).long(), torch_of(mask).long())[0].numpy()
    return [Comparison("text encoder", lambda m, x, k: m(x, k)[:, :20], (ids, mask), found[:, :20])]
