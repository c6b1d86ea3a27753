"""The Wan VAEs on their own: sizes, names, programs, pieces, gradients, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of, problems_between
from sdv_jax.errors import UserError
from sdv_jax.models.wan import vae as wan_vae
from sdv_jax.models.wan import vae_rules
from sdv_jax.models.wan.vae import VAE, Tiling, VAEConfig, patchify, unpatchify
from sdv_jax.models.wan.vae_blocks import ChannelNorm, FrameAttention
from tests import published

NAMES = {"Wan2.1-T2V-1.3B-Diffusers": 126_892_531, "Wan2.2-TI2V-5B-Diffusers": 704_688_668}
_SHARED = {"base_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "z_dim": 2, "temperal_downsample": (True,),
           "latents_mean": (0.0, 0.0), "latents_std": (1.0, 1.0), "scale_factor_temporal": 2}  # fmt: skip
TINY = VAEConfig(**_SHARED, scale_factor_spatial=2)
RESIDUAL = VAEConfig(
    **_SHARED | {"dim_mult": (2, 2), "scale_factor_spatial": 4},
    is_residual=True,
    patch_size=2,
    in_channels=12,
    out_channels=12,
)
KINDS = pytest.mark.parametrize("config", [TINY, RESIDUAL], ids=["2.1", "2.2"])


def published_config(name: str) -> VAEConfig:
    keys = published.config(name, "vae")
    return VAEConfig(**{key: value for key, value in keys.items() if not key.startswith("_")})


def abstract(config: VAEConfig) -> VAE:
    return nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))


def filled(config: VAEConfig) -> tuple[nnx.GraphDef, dict]:
    """(graph, random parameters); drawing them on the host compiles nothing."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(abstract(config))
    return graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, a.dtype), state)


def gradient(loss):
    """The jitted value and gradient. Compiling takes most of its time, and twice as long with optimisation."""
    return jax.jit(jax.value_and_grad(loss), compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def trace(method: str, *shape: int, config: VAEConfig = TINY, **kwargs):
    """The jaxpr of one call on float32 input of `shape`."""
    graph, state = nnx.split(abstract(config))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.make_jaxpr(lambda state, x: getattr(nnx.merge(graph, state), method)(x, **kwargs))(state, x)


@pytest.mark.parametrize("name", NAMES)
def test_published_tensors_are_the_leaves(name):
    config = published_config(name)
    rules, shapes, tensors = (
        vae_rules.vae(config),
        leaf_shapes(nnx.state(abstract(config))),
        published.tensors(name, "vae"),
    )
    leaves = leaves_of(shapes, rules)
    assert problems_between(leaves, tensors, rules) == []
    assert sum(np.prod(shape) for shape in shapes.values()) == NAMES[name]
    for tensor, shape in tensors.items():
        (found,) = [(rule, *rule.path(tensor)) for rule in rules.table if rule.path(tensor)]
        rule, path, layer = found
        assert layer is None and rule.torch_name(path) == tensor
        # Numbered elements of the same arrangement, cut down where that is possible, come back as they were.
        small = np.arange(np.prod([min(n, 3) for n in shape])).reshape([min(n, 3) for n in shape])
        np.testing.assert_array_equal(rule.transform.to_torch(rule.transform.to_ours(small)), small)


def test_published_shapes():
    old, new = map(published_config, NAMES)
    assert (old.spatial_compression, old.temporal_compression, old.latent_channels) == (8, 4, 16)
    assert (new.spatial_compression, new.temporal_compression, new.latent_channels) == (16, 4, 48)
    assert hash(old) == hash(VAEConfig())
    mean, logvar = trace("encode", 1, 81, 480, 832, 3, config=old).out_avals
    assert mean.shape == logvar.shape == (1, 21, 60, 104, 16)
    (video,) = trace("decode", 1, 31, 44, 80, 48, config=new).out_avals
    assert video.shape == (1, 121, 704, 1280, 3)


@KINDS
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_programs_do_not_grow_with_frames(monkeypatch, config, method):
    monkeypatch.setattr(wan_vae, "PIECE_PIXELS", 1)
    lengths, side, channels = ((9, 41), 16, 3) if method == "encode" else ((5, 21), 4, 2)
    short, long = (size(trace(method, 1, length, side, side, channels, config=config).jaxpr) for length in lengths)
    assert short == long


def test_short_clips_are_one_piece():
    assert not any(eqn.primitive.name == "scan" for eqn in trace("encode", 4, 9, 32, 32, 3, config=RESIDUAL).eqns)


def test_programs_do_not_grow_with_tiles():
    tiling = Tiling(16, 16, 12, 12)
    few, many = (trace("decode", 1, 1, side, side, 2, tiling=tiling).jaxpr for side in (11, 35))
    assert convolutions(few) == convolutions(many) == 4 * convolutions(trace("decode", 1, 1, 8, 8, 2).jaxpr)


@KINDS
def test_every_parameter_is_trained(config):
    graph, params = filled(config)

    def objective(params, video):
        model = nnx.merge(graph, params)
        mean, logvar = model.encode(video)
        return jnp.square(model.decode(mean + logvar, clip=False) - video).mean()

    _, gradients = gradient(objective)(params, jnp.asarray(normal(1, 5, 4, 8, 3)))
    for path, found in nnx.to_flat_state(gradients):
        found = np.asarray(found[...])
        assert np.isfinite(found).all() and np.abs(found).max() > 0, path


def test_pieces_change_neither_values_nor_gradients(monkeypatch):
    graph, params = filled(TINY)
    video = jnp.asarray(normal(1, 13, 4, 8, 3))

    def objective(params):  # a new function each time, or the first program would be found again
        return gradient(lambda params, video: sum(x.mean() for x in nnx.merge(graph, params).encode(video)))(
            params, video
        )

    whole = objective(params)
    monkeypatch.setattr(wan_vae, "PIECE_PIXELS", 1)
    for found, expected in zip(*map(jax.tree.leaves, (objective(params), whole)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_future_does_not_change_the_past():
    vae = nnx.merge(*filled(TINY))
    video = normal(1, 13, 4, 4, 3)
    encode = jax.jit(lambda x: vae.encode(x)[0])
    before, after = encode(video), encode(np.concatenate([video[:, :5], video[:, 5:] + 1], axis=1))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert not np.allclose(before[:, 3:], after[:, 3:])


def test_decoded_pixels_are_clipped_unless_told_otherwise():
    graph, params = filled(TINY)

    @jax.jit
    def decode(params, latents):
        vae = nnx.merge(graph, params)
        vae.decoder.conv_out.bias[...] += jnp.array([-2.0, 0.0, 2.0])
        return vae.decode(latents), vae.decode(latents, clip=False)

    clipped, raw = decode(params, jnp.asarray(normal(1, 1, 2, 2, 2)))
    assert raw.min() < -1 and raw.max() > 1
    np.testing.assert_array_equal(clipped, np.clip(raw, -1, 1))


def test_patches_hold_columns_before_rows():
    video = np.arange(2 * 4 * 6).reshape(1, 1, 4, 6, 2).astype(np.float32)
    patches = patchify(jnp.asarray(video), 2)
    # channel (colour, column, row) of the patch at row 1, column 2
    expected = [video[0, 0, 2 + row, 4 + column, c] for c in range(2) for column in range(2) for row in range(2)]
    np.testing.assert_array_equal(patches[0, 0, 1, 2], expected)
    np.testing.assert_array_equal(unpatchify(patches, 2), video)


def test_norm_of_nothing_is_nothing():
    norm = ChannelNorm(4, dtype=jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros((1, 4)))
    assert value == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("channels, wide", [(136, True), (12, True), (16, False)])
def test_only_narrow_heads_go_to_the_flash_kernel(monkeypatch, channels, wide):
    called = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **kwargs: called.append(kwargs) or v)
    frame = jnp.ones((1, 1, 2, 2, channels), jnp.bfloat16)
    nnx.eval_shape(lambda: FrameAttention(channels, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(frame))
    assert bool(called) is not wide


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base_dim": 0}, "base_dim = 0; expected a whole number >= 1"),
        ({"base_dim": 1, "dim_mult": [1] * 4}, "base_dim = 1; expected at least 2"),
        ({"decoder_base_dim": "wide"}, "decoder_base_dim = 'wide'; expected a whole number >= 1"),
        ({"z_dim": -16}, "z_dim = -16; expected a whole number >= 1"),
        ({"z_dim": 4}, r"latents_mean = .*; expected a list of 4 finite numbers"),
        ({"latents_mean": None}, "latents_mean = None; expected a list of 16 finite numbers"),
        ({"latents_std": [0] * 16}, "latents_std = .*; expected a list of 16 finite numbers > 0"),
        ({"latents_std": [float("inf")] * 16}, "latents_std = .*; expected a list of 16 finite numbers > 0"),
        ({"dim_mult": 4}, "dim_mult = 4; expected a list of 1 to 8 whole numbers"),
        ({"dim_mult": []}, r"dim_mult = \(\); expected a list"),
        ({"dim_mult": [1, 2.5, 4, 4]}, r"dim_mult\[1\] = 2.5; expected a whole number >= 1"),
        ({"num_res_blocks": 1000}, "num_res_blocks = 1000; expected a whole number <= 16"),
        ({"temperal_downsample": [True, True]}, r"temperal_downsample = .*; expected a list of 3 times true or false"),
        ({"temperal_downsample": [0, 1, 1]}, r"temperal_downsample = .*; expected a list of 3 times true or false"),
        ({"temperal_downsample": True}, "temperal_downsample = True; expected a list of 3"),
        ({"temperal_downsample": [True] * 3}, "temperal_downsample = .*; expected at most two times true"),
        ({"attn_scales": [0.5]}, r"attn_scales = \(0.5,\); expected an empty list"),
        ({"dropout": float("nan")}, "dropout = nan; expected a finite number >= 0"),
        ({"is_residual": 1}, "is_residual = 1; expected true or false"),
        ({"is_residual": True, "dim_mult": [1, 2, 4, 8]}, "dim_mult = .*; expected widths .* 4 is no multiple of 8"),
        ({"is_residual": True, "dim_mult": [3, 1, 1, 1]}, "dim_mult = .*; expected widths"),
        ({"patch_size": 0}, "patch_size = 0; expected a whole number >= 1"),
        ({"patch_size": 2}, "in_channels = 3; expected a multiple of 4"),
        ({"in_channels": 12, "patch_size": 2}, "out_channels = 3; expected a multiple of 4"),
        ({"scale_factor_spatial": 0}, "scale_factor_spatial = 0; expected a whole number >= 1"),
        ({"clip_output": "no"}, "clip_output = 'no'; expected true or false"),
    ],
)
def test_impossible_configs(changes, words):
    with pytest.raises(UserError, match=f"^vae config: {words}") as caught:
        VAEConfig(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method, shape, options, words",
    [
        ("encode", (1, 1, 8, 8, 4), {}, "3 channels"),
        ("encode", (1, 0, 8, 8, 3), {}, "at least 1 frame"),
        ("encode", (1, 1, 8, 1, 3), {}, "at least 1 frame of 2x2"),
        ("encode", (1, 1, 8, 10, 3), {"config": RESIDUAL}, "multiples of 4, found 8x10"),
        ("encode", (1, 1, 9, 8, 3), {"tiling": Tiling(4, 4, 4, 4)}, "edge tile smaller than 2"),
        ("encode", (1, 1, 8, 8, 3), {"tiling": Tiling(4, 4, 3, 2)}, "no whole latents; expected multiples of 2"),
        ("decode", (1, 1, 8, 8, 3), {}, "2 channels"),
        ("decode", (1, 1, 8, 8, 2), {"tiling": Tiling(5, 4, 4, 4)}, "no whole latents"),
    ],
)
def test_impossible_inputs(method, shape, options, words):
    with pytest.raises(UserError, match=words):
        trace(method, *shape, **options)


@pytest.mark.parametrize("sizes, words", [((4, 4, 4, 6), "leave gaps"), ((4, 4, 0, 4), "a whole number >= 1")])
def test_impossible_tiles(sizes, words):
    with pytest.raises(UserError, match=words):
        Tiling(*sizes)


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
