"""The CogVideoX VAE on its own: sizes, programs, gradients, mistakes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.vae import VAE, Tiling, VAEConfig
from sdv_jax.nn import causal_conv3d
from sdv_jax.nn.causal_conv3d import CausalConv3d, FrameConv

PUBLISHED = pathlib.Path(__file__).parents[1] / "published"
TINY = VAEConfig(
    down_block_types=("CogVideoXDownBlock3D",) * 2,
    up_block_types=("CogVideoXUpBlock3D",) * 2,
    block_out_channels=(4, 8),
    temporal_compression_ratio=2,
    latent_channels=2,
    layers_per_block=1,
    norm_num_groups=2,
)


def published(name: str) -> VAEConfig:
    keys = json.loads((PUBLISHED / name / "vae" / "config.json").read_text())
    return VAEConfig(**{key: value for key, value in keys.items() if not key.startswith("_")})


def abstract(config: VAEConfig) -> VAE:
    return nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))


def filled(build, seed: int = 0):
    """The module that `build()` makes, with random parameters; drawing them on the host compiles nothing."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, a.dtype), state))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def trace(method: str, *shape: int, config: VAEConfig = TINY, **kwargs):
    """The jaxpr of one call on float32 input of `shape`."""
    graph, state = nnx.split(abstract(config))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.make_jaxpr(lambda state, x: getattr(nnx.merge(graph, state), method)(x, **kwargs))(state, x)


@pytest.mark.parametrize("name", ["CogVideoX-2b", "CogVideoX-5b"])
def test_published_size(name):
    config = published(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract(config)))) == 215_583_907
    assert hash(config) == hash(published(name))


def test_published_shapes():
    config = published("CogVideoX-5b")
    mean, logvar = trace("encode", 1, 49, 480, 720, 3, config=config).out_avals
    assert mean.shape == logvar.shape == (1, 13, 60, 90, 16)
    (video,) = trace("decode", 1, 13, 60, 90, 16, config=config).out_avals
    assert video.shape == (1, 49, 480, 720, 3)


@pytest.mark.parametrize("method, short, long", [
    ("encode", (1, 16, 4, 4, 3), (1, 80, 4, 4, 3)), ("decode", (1, 5, 2, 2, 2), (1, 21, 2, 2, 2)),
])  # fmt: skip
def test_programs_do_not_grow_with_frames(method, short, long):
    assert size(trace(method, *short).jaxpr) == size(trace(method, *long).jaxpr)


def test_programs_do_not_grow_with_tiles():
    tiling = Tiling(16, 16, 0.25, 0.25)
    few, many = (trace("decode", 1, 1, side, side, 2, tiling=tiling).jaxpr for side in (20, 62))
    assert convolutions(few) == convolutions(many) == 4 * convolutions(trace("decode", 1, 1, 8, 8, 2).jaxpr)


def test_long_inputs_are_convolved_in_groups_of_frames(monkeypatch):
    x = normal(1, 7, 6, 5, 4)
    causal = filled(lambda: CausalConv3d(4, 3, rngs=nnx.Rngs(0)))
    strided = filled(lambda: FrameConv(4, 3, stride=2, padding=((0, 1), (0, 1)), rngs=nnx.Rngs(0)))

    def both(x):
        return causal(x)[0], strided(x)

    whole = jax.jit(both)(x)
    monkeypatch.setattr(causal_conv3d, "MAX_CONV_ELEMENTS", 2 * x[:, :1].size)
    split = jax.jit(lambda x: both(x))  # another function, or the first program would be found again
    assert convolutions(jax.make_jaxpr(split)(x).jaxpr) == 7 + 4
    for found, expected in zip(split(x), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_future_does_not_change_the_past():
    video = normal(1, 17, 4, 4, 3)
    vae = filled(lambda: VAE(TINY, rngs=nnx.Rngs(0)))
    encode = jax.jit(lambda x: vae.encode(x)[0])
    changed = np.concatenate([video[:, :9], video[:, 9:] + 1], axis=1)  # 17 frames are batches of 9 and 8
    before, after = encode(video), encode(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


def test_every_parameter_is_trained():
    graph, params = nnx.split(filled(lambda: VAE(TINY, rngs=nnx.Rngs(0))))
    video = jnp.asarray(normal(1, 3, 4, 4, 3))

    def objective(params):
        model = nnx.merge(graph, params)
        mean, logvar = model.encode(video)
        return jnp.square(model.decode(mean + logvar)).mean()

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(objective))(params)):
        gradient = np.asarray(gradient[...])
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"down_block_types": ("DownBlock3D",) * 4}, "down_block_types = .*; expected 4 times 'CogVideoXDownBlock3D'"),
        ({"up_block_types": ("CogVideoXUpBlock3D",) * 3}, "up_block_types = .*; expected 4 times"),
        ({"norm_num_groups": 48}, r"block_out_channels = \(128, .*\); expected multiples of norm_num_groups"),
        ({"norm_num_groups": 0}, "norm_num_groups = 0; expected a whole number >= 1"),
        ({"in_channels": "3"}, "in_channels = '3'; expected a whole number >= 1"),
        ({"out_channels": True}, "out_channels = True; expected a whole number >= 1"),
        ({"latent_channels": -16}, "latent_channels = -16; expected a whole number >= 1"),
        ({"layers_per_block": 1.5}, "layers_per_block = 1.5; expected a whole number >= 1"),
        ({"layers_per_block": 1_000_000}, "layers_per_block = 1000000; expected a whole number <= 16"),
        ({"sample_height": None}, "sample_height = None; expected a whole number >= 1"),
        ({"sample_width": 10**30}, r"sample_width = 1000000\d*; expected a whole number <= 16777216"),
        ({"block_out_channels": ()}, r"block_out_channels = \(\); expected a list of 1 to 8 whole numbers"),
        ({"block_out_channels": "wide"}, "block_out_channels = 'wide'; expected a list"),
        ({"block_out_channels": [128, 0, 256, 512]}, r"block_out_channels\[1\] = 0; expected a whole number >= 1"),
        ({"block_out_channels": [128, [256], 256, 512]}, r"block_out_channels\[1\] = \[256\]; expected a whole number"),
        ({"scaling_factor": float("nan")}, "scaling_factor = nan; expected a finite number > 0"),
        ({"scaling_factor": float("inf")}, "scaling_factor = inf; expected a finite number > 0"),
        ({"scaling_factor": 0}, "scaling_factor = 0; expected a finite number > 0"),
        ({"scaling_factor": "0.7"}, "scaling_factor = '0.7'; expected a finite number > 0"),
        ({"norm_eps": -1e-6}, "norm_eps = -1e-06; expected a finite number > 0"),
        ({"use_quant_conv": "no"}, "use_quant_conv = 'no'; expected true or false"),
        ({"temporal_compression_ratio": 3}, "temporal_compression_ratio = 3; expected a power of two from 1 to 128"),
        ({"temporal_compression_ratio": 512}, "temporal_compression_ratio = 512; expected a power of two"),
        ({"temporal_compression_ratio": 0}, "temporal_compression_ratio = 0; expected a finite number > 0"),
        ({"act_fn": "tanh"}, "act_fn = 'tanh'; expected one of"),
        ({"act_fn": {}}, "act_fn = {}; expected one of"),
        ({"use_quant_conv": True}, "quant convolutions need out_channels == latent_channels"),
    ],
)
def test_impossible_configs(changes, words):
    with pytest.raises(UserError, match=f"^vae config: {words}") as caught:
        VAEConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"scaling_factor": 1}, {"temporal_compression_ratio": 4.0}, {"in_channels": 5}])
def test_unusual_configs(changes):
    assert VAEConfig(**changes).temporal_levels == 2


@pytest.mark.parametrize(
    "method, shape, tiling, words",
    [
        ("encode", (1, 1, 8, 8, 4), None, "3 channels"),
        ("encode", (1, 0, 8, 8, 3), None, "at least 1 frame"),
        ("encode", (1, 1, 8, 1, 3), None, "at least 1 frame of 2x2"),
        ("encode", (1, 1, 9, 8, 3), Tiling(4, 4, 0.5, 0.5), "edge tile smaller than 2"),
        ("decode", (1, 1, 8, 8, 3), None, "2 channels"),
        ("decode", (1, 1, 8, 8, 2), Tiling(2, 2), "cannot advance"),
    ],
)
def test_impossible_inputs(method, shape, tiling, words):
    with pytest.raises(UserError, match=words):
        trace(method, *shape, tiling=tiling)


def size(jaxpr) -> int:
    """Equations of a jaxpr and of every jaxpr inside it."""
    return sum(1 + sum(size(inner) for inner in jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns)


def convolutions(jaxpr) -> int:
    """Convolutions of a jaxpr and of every jaxpr inside it."""
    return sum(
        (eqn.primitive.name == "conv_general_dilated")
        + sum(convolutions(inner) for inner in jaxprs_in_params(eqn.params))
        for eqn in jaxpr.eqns
    )
