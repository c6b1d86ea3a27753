"""The path tables: every parameter of every variant is named, and a parameter that is not is an error."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.models.cogvideox import LORA_TARGETS, SHARDING, VARIANTS
from sdv_jax.models.cogvideox.family import FAMILY as COGVIDEOX
from sdv_jax.sharding import dotted, reshard, shardings, spec_of
from tests.tiny_transformer import NAMES, make


@pytest.fixture(scope="module", params=VARIANTS)
def adapted(request):
    """Shapes of a published transformer with paper A's adapter."""

    def build():
        model = COGVIDEOX.components["transformer"].module(VARIANTS[request.param].transformer, rngs=nnx.Rngs(0))
        lora.add(model, lora.LoraConfig(targets=LORA_TARGETS), names=NAMES, rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(build)


def test_the_table_fits_every_leaf(adapted):
    """Each leaf has a row, whose axes exist and divide among eight devices wherever they are cut."""
    cut = total = 0
    for path, leaf in nnx.to_flat_state(nnx.state(adapted)):
        spec, size = spec_of(dotted(path), SHARDING), leaf.size
        assert len(spec) <= leaf.ndim, path
        axes = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        assert all(leaf.shape[axis] % 8 == 0 for axis in axes), path
        if path[-2] != "lora":
            total, cut = total + size, cut + size * bool(axes)
    assert cut / total > 0.99  # almost all of the model is spread


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", COGVIDEOX.components)
def test_every_component_can_be_placed(variant, name):
    component = COGVIDEOX.components[name]
    module = component.abstract(getattr(VARIANTS[variant], name), dtype=jnp.float32)
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        assert len(spec_of(dotted(path), COGVIDEOX.placement(name))) <= leaf.ndim


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("blocks.attn1.to_q.kernel", jax.P(None, "fsdp", None)),
        ("blocks.attn1.to_q.bias", jax.P()),
        ("blocks.attn1.to_q.lora.a", jax.P(None, "fsdp", None)),
        ("blocks.attn1.to_q.lora.b", jax.P(None, None, "fsdp")),
        ("patch_embed.proj.lora.a", jax.P()),
        ("patch_embed.text_proj.kernel", jax.P("fsdp", None)),
        ("patch_embed.proj.kernel", jax.P()),
    ],
)
def test_rows(path, spec):
    assert spec_of(path, SHARDING) == spec


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(KeyError, match="no sharding rule names the parameter 'controller.kernel'"):
        spec_of("controller.kernel", SHARDING)


def test_first_row_wins():
    table = ((r"kernel$", jax.P("fsdp")), (r"", jax.P()))
    assert spec_of("a.kernel", table) == jax.P("fsdp") and spec_of("a.bias", table) == jax.P()


def test_without_a_mesh_nothing_happens():
    x = jnp.ones(3)
    assert reshard(x, jax.P("fsdp")) is x
    state = nnx.state(make())
    assert set(jax.tree.leaves(shardings(state, SHARDING, None), is_leaf=lambda leaf: leaf is None)) == {None}


def test_with_a_mesh_every_leaf_has_its_sharding():
    mesh = jax.make_mesh((1,), ("fsdp",))
    state = nnx.state(make())
    found = dict(nnx.to_flat_state(shardings(state, SHARDING, mesh)))
    assert found.keys() == {path for path, _ in nnx.to_flat_state(state)}
    assert found["blocks", "ff", "up", "kernel"] == jax.NamedSharding(mesh, jax.P(None, "fsdp", None))
    with jax.set_mesh(mesh):
        assert reshard(
            jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P("fsdp"))), jax.P()
        ).sharding.spec == jax.P(None)
