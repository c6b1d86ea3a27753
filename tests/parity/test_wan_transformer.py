"""Our Wan transformer against diffusers': predictions, given first frames, references, one block at the real width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from sdv_jax.checkpoints.engine import match
from sdv_jax.models.wan.family import FAMILY
from sdv_jax.models.wan.transformer import ReferencePlacement, TransformerConfig
from tests.parity.compare import assert_close
from tests.parity.weights import _InMemory as InMemory
from tests.parity.weights import randomise

TINY = {
    "patch_size": (1, 2, 2), "num_attention_heads": 3, "attention_head_dim": 20, "in_channels": 4, "out_channels": 4,
    "text_dim": 12, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
CONFIGS = {
    "tiny": {},
    "one_head": {"num_attention_heads": 1, "attention_head_dim": 32, "num_layers": 1},
    "patch_1": {"patch_size": (1, 1, 1), "attention_head_dim": 14},
    "patch_t": {"patch_size": (2, 2, 2), "in_channels": 3, "out_channels": 5},
    "no_cross_norm": {"cross_attn_norm": False, "eps": 1e-5},
}


@functools.cache
def pair(name: str = "tiny"):
    """(diffusers' model, ours), float32, with equal random weights."""
    settings = TINY | CONFIGS[name]
    theirs = WanTransformer3DModel(**settings).eval()
    randomise(theirs, 0)
    return theirs, ours_of(theirs, TransformerConfig(**settings))


def ours_of(theirs, config):
    component = FAMILY.components["transformer"]
    tensors = {name: InMemory.of(name, value) for name, value in theirs.state_dict().items()}
    source = match(tensors, component.leaves(config), component.rules(config), where="memory")
    leaves = {leaf.path: leaf for leaf in source.leaves}
    model = component.abstract(config, dtype=jnp.float32)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        leaf = leaves[".".join(path)]
        whole = tuple(slice(0, n) for n in leaf.shape)
        variable.set_value(jnp.asarray(source.read(leaf, whole, np.dtype(np.float32))))
    return model


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


OWN = ReferencePlacement()


def run(ours, *inputs, placement=OWN, **given):
    graph, state = nnx.split(ours)

    @jax.jit
    def call(state, inputs, given):
        return nnx.merge(graph, state)(*inputs, **given, placement=placement)

    return np.asarray(call(state, *jax.tree.map(jnp.asarray, (inputs, given))))


def peer(theirs, latents, times, text):
    with torch.no_grad():
        first = torch.from_numpy(np.moveaxis(latents, -1, 1).copy())
        out = theirs(first, torch.from_numpy(times), torch.from_numpy(text), return_dict=False)[0]
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize(
    ("name", "size"),
    [("tiny", (1, 6, 4)), ("tiny", (5, 10, 6)), ("tiny", (17, 2, 2)), ("one_head", (5, 4, 14)), ("patch_1", (3, 5, 3)),
     ("patch_t", (4, 6, 2)), ("no_cross_norm", (2, 4, 6))],
)  # fmt: skip
def test_prediction(name, size):
    theirs, ours = pair(name)
    latents, text = draw((2, *size, ours.config.in_channels), (2, 7, 12))
    times = np.array([999.0, 3.5], np.float32)
    assert_close(run(ours, latents, text, times), peer(theirs, latents, times, text), relative=1e-4)


def test_a_given_first_frame_is_clean():
    """diffusers is told t = 0 token by token."""
    theirs, ours = pair()
    latents, image, text = draw((2, 5, 6, 8, 4), (2, 1, 6, 8, 4), (2, 7, 12))
    times = np.array([640.0, 20.0], np.float32)
    each = np.repeat(times[:, None], 5 * 12, axis=1)
    each[:, :12] = 0
    seen = np.concatenate([image, latents[:, 1:]], axis=1)
    assert_close(run(ours, latents, text, times, image=image), peer(theirs, seen, each, text), relative=1e-4)


@pytest.mark.parametrize(
    ("placement", "slots", "aside"),
    [(ReferencePlacement(), lambda k, t: (range(t, t + k), range(t)), 4.0),
     (ReferencePlacement("after", 7, 0.0), lambda k, t: (range(t + 6, t + 6 + k), range(t)), 0.0),
     (ReferencePlacement("after", 0, 0.5), lambda k, t: (range(t - 1, t - 1 + k), range(t)), 2.0),
     (ReferencePlacement("before"), lambda k, t: (range(k), range(k, k + t)), 4.0),
     (ReferencePlacement("before", 1, 0.0), lambda k, t: (range(k), range(k, k + t)), 0.0)],
)  # fmt: skip
@pytest.mark.parametrize(("count", "image"), [(1, False), (3, True)])
def test_references(placement, slots, aside, count, image, monkeypatch):
    """References as further frames of diffusers' input, at t = 0 and with rotary tables made here by the definition."""
    theirs, ours = pair()
    frames, height, width = 3, 3, 4
    latents, text = draw((2, frames, 2 * height, 2 * width, 4), (2, 7, 12))
    reference, first = draw((2, count, 2 * height, 2 * width, 4), (2, 1, 2 * height, 2 * width, 4), seed=1)
    own, clip = slots(count, frames)
    places = [(t, h, w + aside) for t in own for h in range(height) for w in range(width)]
    places += [(t, h, w) for t in clip for h in range(height) for w in range(width)]
    monkeypatch.setattr(theirs.rope, "forward", lambda _: rotary(np.array(places, np.float64), 20))
    times = np.array([640.0, 20.0], np.float32)
    each = np.repeat(times[:, None], len(places), axis=1)
    each[:, : (count + image) * height * width] = 0
    seen = np.concatenate([reference, first if image else latents[:, :1], latents[:, 1:]], axis=1)
    expected = peer(theirs, seen, each, text)[:, count:]
    given = {"image": first} if image else {}
    found = run(ours, latents, text, times, reference=reference, placement=placement, **given)
    assert_close(found, expected, relative=1e-4)


def rotary(places: np.ndarray, head: int):
    """cos and sin [1, n, 1, head] of tokens at (t, h, w), from the definition."""
    spatial = 2 * (head // 6)
    sizes = (head - 2 * spatial, spatial, spatial)
    steps = [10000.0 ** (-np.arange(0, size, 2) / size) for size in sizes]
    angles = [np.outer(at, step) for at, step in zip(places.T, steps, strict=True)]
    angles = np.repeat(np.concatenate(angles, 1), 2, axis=1)[None, :, None]
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def test_dropped_tokens_are_tokens_that_never_were():
    """Keeping all tokens changes nothing; keeping those of one reference is having that one alone, in its own slot."""
    _, ours = pair()
    latents, text, reference = draw((2, 2, 4, 6, 4), (2, 7, 12), (2, 2, 4, 6, 4))
    times = np.array([640.0, 20.0], np.float32)
    whole = run(ours, latents, text, times, reference=reference)
    everything = jnp.tile(jnp.arange(12), (2, 1))
    assert_close(run(ours, latents, text, times, reference=reference, reference_index=everything), whole, relative=1e-5)
    first = run(ours, latents, text, times, reference=reference, reference_index=everything[:, :6])
    assert_close(first, run(ours, latents, text, times, reference=reference[:, :1]), relative=1e-5)
    second = run(ours, latents, text, times, reference=reference, reference_index=everything[:, 6:])
    beside = ReferencePlacement("after", 2, 1.0)
    assert_close(second, run(ours, latents, text, times, reference=reference[:, 1:], placement=beside), relative=1e-5)
    assert np.abs(first - whole).max() > 1e-3


def test_one_block_at_the_width_of_wan22_5b():
    settings = {
        "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48, "text_dim": 4096,
        "ffn_dim": 14336, "num_layers": 1,
    }  # fmt: skip
    theirs = WanTransformer3DModel(**settings).eval()
    randomise(theirs, 0)
    ours = ours_of(theirs, TransformerConfig(**settings))
    latents, text = draw((1, 3, 4, 6, 48), (1, 16, 4096))
    times = np.array([421.0], np.float32)
    assert_close(run(ours, latents, text, times), peer(theirs, latents, times, text), relative=1e-4)
