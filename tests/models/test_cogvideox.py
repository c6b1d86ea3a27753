"""The CogVideoX family: its variants at their real size (abstractly), its contract, its config's refusals; import."""

import dataclasses
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of, problems_between
from sdv_jax.checkpoints.families import families, rules_of
from sdv_jax.errors import UserError
from sdv_jax.models import cogvideox
from sdv_jax.models.cogvideox import rules
from sdv_jax.models.cogvideox.transformer import TransformerConfig
from sdv_jax.sharding import spec_of
from tests import published
from tests.tiny_transformer import CONFIG, inputs, make, run

POSITIONS = 17_776 * 3_072  # a buffer in torch, learned positions here
PARAMETERS = {  # of the published safetensors; of diffusers' model, where that is all there is to go by (1.5-I2V)
    "CogVideoX-2b": 1_693_783_872,
    "CogVideoX-5b": 5_570_283_072,
    "CogVideoX-5b-I2V": 5_570_479_680 + POSITIONS,
    "CogVideoX1.5-5B": 5_570_676_352,
    "CogVideoX1.5-5B-I2V": 5_571_594_880,
}
SHAPES = dict.fromkeys(PARAMETERS, (13, 60, 90)) | {name: (22, 96, 170) for name in PARAMETERS if "1.5" in name}


@pytest.mark.parametrize("name", cogvideox.VARIANTS)
def test_variant_has_the_published_size_and_runs_abstractly(name):
    config = cogvideox.VARIANTS[name]
    model = nnx.eval_shape(lambda: cogvideox.build(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}

    def shape(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype)

    c = config.transformer
    size = (1, *SHAPES[name], c.latent_channels)
    assert SHAPES[name] == (c.latent_frames + -c.latent_frames % c.patch[0], c.sample_height, c.sample_width)
    text, picture = shape(1, c.max_text_seq_length, c.text_embed_dim), shape(1, 1, *size[2:])
    pictures = {"reference": picture} | ({"image": picture} if name.endswith("I2V") else {})
    out = nnx.eval_shape(
        lambda m, *a, **k: m(*a, **k), model, shape(*size), text, shape(1, dtype=jnp.int32), **pictures
    )
    assert (out.shape, out.dtype) == ((1, *SHAPES[name], 16), jnp.bfloat16)


@pytest.mark.parametrize("name", sorted(set(published.CHECKPOINTS) & set(cogvideox.VARIANTS)))
def test_variant_is_the_published_config_and_takes_the_published_tensors(name):
    config = cogvideox.VARIANTS[name]
    for component, own in (("transformer", config.transformer), ("vae", config.vae)):
        raw = {key: value for key, value in published.config(name, component).items() if not key.startswith("_")}
        assert type(own)(**raw) == own
        assert set(raw) <= {field.name for field in dataclasses.fields(own)}
    table = rules.of_transformer(config.transformer)
    model = nnx.eval_shape(lambda: cogvideox.build(config, rngs=nnx.Rngs(0)))
    leaves = leaves_of(leaf_shapes(nnx.state(model)), table)
    assert not problems_between(leaves, published.tensors(name, "transformer"), table)
    for leaf in leaves:
        assert spec_of(leaf.path, cogvideox.SHARDING) is not None


@pytest.mark.parametrize("name", cogvideox.VARIANTS)
def test_the_paper_targets_exist_in_every_variant(name):
    config = cogvideox.VARIANTS[name]

    def build():
        model = cogvideox.build(config, rngs=nnx.Rngs(0))
        settings = lora.LoraConfig(rank=128, alpha=64, targets=cogvideox.LORA_TARGETS)
        lora.add(model, settings, names=rules_of(model)[1].to_torch_module_name, rngs=nnx.Rngs(0))
        return model

    paths = [path for path, _ in lora.adapted(nnx.eval_shape(build))]
    assert len(paths) == 10 and not {"proj_out", "norm_out.linear", "time_embedding.linear_1"} & set(paths)


def test_the_family_is_registered_with_its_own_contract():
    (family,) = (family for family in families() if family.name == "cogvideox")
    assert family.variants is cogvideox.VARIANTS and family.sharding is cogvideox.SHARDING
    for name, config in cogvideox.VARIANTS.items():
        assert family.variant({part: getattr(config, part) for part in family.components}) == name
    with pytest.raises(TypeError, match="Linear is not the transformer of a known family"):
        rules_of(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


REFUSED = {
    "patch_size_t": (0, "patch_size_t = 0; expected a whole number >= 1"),
    "ofs_embed_dim": (256, "ofs_embed_dim = 256; expected null or time_embed_dim, 512"),
    "use_learned_positional_embeddings": ("yes", "use_learned_positional_embeddings = 'yes'; expected true or false"),
    "activation_fn": ("geglu", "activation_fn = 'geglu' is not supported"),
    "timestep_activation_fn": ("relu", "timestep_activation_fn = 'relu' is not supported"),
    "dropout": (0.1, "dropout = 0.1 is not supported"),
    "num_layers": (0, "num_layers = 0; expected a whole number >= 1"),
    "sample_frames": (10**9, "sample_frames = 1000000000; expected a whole number <= 16777216"),
    "norm_eps": ("tiny", "norm_eps = 'tiny'; expected a finite number > 0"),
    "patch_bias": (None, "patch_bias = None; expected true or false"),
    "patch_size": (-2, "patch_size = -2; expected a whole number >= 1"),
    "in_channels": ("16", "in_channels = '16'; expected a whole number >= 1"),
    "out_channels": (None, "out_channels = None; expected a whole number >= 1"),
    "attention_head_dim": (40, "attention_head_dim = 40, .* expected attention_head_dim to be a multiple of 16"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_configs_that_are_refused(key):
    value, message = REFUSED[key]
    with pytest.raises(UserError, match=f"^transformer config: {message}") as error:
        TransformerConfig(**{key: value}, use_rotary_positional_embeddings=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"patch_size_t": 2}, "patch_size_t = 2 needs use_rotary_positional_embeddings = true"),
        (
            {"use_learned_positional_embeddings": True},
            "use_learned_positional_embeddings = True needs use_rotary_positional_embeddings = true",
        ),
        (
            {
                "use_learned_positional_embeddings": True,
                "use_rotary_positional_embeddings": True,
                "patch_size_t": 2,
            },
            "use_learned_positional_embeddings = true; expected false with a patch_size_t",
        ),
    ],
)
def test_combinations_that_are_refused(values, message):
    """diffusers refuses the second when it builds the model, and the others' tables when it runs it."""
    with pytest.raises(UserError, match=f"^transformer config: {message}$"):
        TransformerConfig(**values)


def test_widths_that_sincos_positions_cannot_have():
    with pytest.raises(UserError, match="expected their product to be a multiple of 16"):
        TransformerConfig(num_attention_heads=3, attention_head_dim=8)
    assert TransformerConfig(num_attention_heads=4, attention_head_dim=8).width == 32


@pytest.mark.parametrize("rotary", [True, False])
def test_no_reference_is_no_reference_token(rotary):
    """Without a reference the model is the plain text-to-video one, and a reference changes its answer."""
    model = make(dataclasses.replace(CONFIG, use_rotary_positional_embeddings=rotary))
    latents, text, timesteps, reference = inputs(references=1)
    without = run(model, (latents, text, timesteps, None))
    assert without.shape == latents.shape
    assert not np.allclose(run(model, (latents, text, timesteps, reference)), without, atol=1e-3)


def test_examples_of_a_batch_are_independent():
    model, (latents, text, timesteps, _) = make(), inputs()
    both = run(model, (latents, text, timesteps, None))
    alone = run(model, (latents[1:], text[1:], timesteps[1:], None))
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_learned_positions_on_a_mesh():
    """They are the one leaf besides matrices that is cut: eight devices give what one gives."""
    script = """
import jax, jax.numpy as jnp
from flax import nnx
from sdv_jax.models.cogvideox import SHARDING
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from sdv_jax.sharding import shardings

config = TransformerConfig(
    num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=1, sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=5,
    use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
)
graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
keys = jax.random.split(jax.random.key(0), 2)
latents, text = jax.random.normal(keys[0], (1, 3, 4, 6, 4)), jax.random.normal(keys[1], (1, 5, 16))
run = jax.jit(lambda state, *given: nnx.merge(graph, state)(*given, reference=given[0][:, :1]))
alone = run(state, latents, text, jnp.array([7]))
mesh = jax.make_mesh((8,), ("fsdp",))
with jax.set_mesh(mesh):
    spread = jax.device_put(state, shardings(state, SHARDING, mesh))
    assert "fsdp" in spread.patch_embed.pos_embedding[...].sharding.spec
    together = run(spread, *jax.device_put((latents, text, jnp.array([7])), jax.NamedSharding(mesh, jax.P())))
assert jnp.allclose(jax.device_get(together), jax.device_get(alone), atol=1e-5)
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_import_has_no_effects():
    """No torch, no diffusers, no device: for the package, and for all that a user's first call brings in."""
    script = """
import sys
import sdv_jax
assert "jax" not in sys.modules and "torch" not in sys.modules
import sdv_jax.pipeline, sdv_jax.cli, sdv_jax.train.step, sdv_jax.checkpoints.convert
loaded = {"torch", "diffusers", "transformers", "peft"} & set(sys.modules)
assert not loaded, loaded
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
