"""Low-rank adapters in the slots of a transformer, against what PEFT does where PEFT has a say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.adapters.lora import LoraConfig
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox import LORA_TARGETS
from sdv_jax.nn.linear import Linear, LoRA
from tests.parity.compare import assert_close, relative_error
from tests.tiny_transformer import CONFIG, NAMES, fill_adapter, inputs, make, run

SETTINGS = LoraConfig(rank=4, alpha=2.0, targets=LORA_TARGETS, dropout=0.25)
DEPTH = CONFIG.num_layers


@pytest.fixture
def model():
    return make()


@pytest.fixture
def adapted(model):
    lora.add(model, SETTINGS, names=NAMES, rngs=nnx.Rngs(1))
    fill_adapter(model)
    return model


# MARK: which layers


@pytest.fixture(scope="module")
def theirs():
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**dataclasses.asdict(CONFIG))


TARGETS = [LORA_TARGETS, ("proj",), ("to_k", "ff.net.2"), ("proj_out",), ("linear",), ("attn1.to_out.0", "linear_1")]


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_layers_are_those_of_peft(theirs, model, targets):
    """PEFT decides with a function of its own, module by module."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = PeftConfig(target_modules=list(targets))
    hit = {name for name, _ in theirs.named_modules() if check_target_module_exists(config, name)}
    lora.add(model, LoraConfig(rank=2, targets=targets), names=NAMES, rngs=nnx.Rngs(0))
    filled = {
        NAMES(path, block)
        for path, layer in lora.adapted(model)
        for block in (range(DEPTH) if layer.kernel.ndim == 3 else [None])
    }
    assert filled == hit
    assert hit


def test_paper_a_hits_eight_layers_of_a_block_and_two_more(adapted):
    paths = [path for path, _ in lora.adapted(adapted)]
    assert sum(path.startswith("blocks.") for path in paths) == 8
    assert [path for path in paths if not path.startswith("blocks.")] == ["patch_embed.proj", "patch_embed.text_proj"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("to_q", "to_z", "nothing"),
            r"lora.targets: no layer is named to_z, nothing; .*transformer_blocks.0.attn1.to_q",
        ),
        (("o_q",), "no layer is named o_q"),
        (("norm1.norm",), "no layer is named norm1.norm"),
        (
            ("transformer_blocks.1.attn1.to_q",),
            "transformer_blocks.1.attn1.to_q is hit, but not that layer of every block",
        ),
    ],
)
def test_bad_targets_change_nothing(model, targets, message):
    with pytest.raises(UserError, match=message) as error:
        lora.add(model, LoraConfig(targets=targets), names=NAMES, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)
    assert not list(lora.adapted(model))


def test_a_target_may_name_one_layer_of_every_block(model):
    targets = tuple(f"transformer_blocks.{block}.attn1.to_q" for block in range(DEPTH))
    lora.add(model, LoraConfig(targets=targets), names=NAMES, rngs=nnx.Rngs(0))
    assert [path for path, _ in lora.adapted(model)] == ["blocks.attn1.to_q"]


@pytest.mark.parametrize(
    ("change", "message"), [({"rank": 0}, "rank must be at least 1"), ({"targets": ()}, "is empty")]
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, **change)


# MARK: what an adapter does


def base_paths(model) -> list[tuple]:
    """Where the weights are that belong to no adapter (nnx counts LoRAParam among Param)."""
    return [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))]


def test_nothing_changes_at_the_start(model):
    given = inputs(references=1)
    before, paths = run(model, given), base_paths(model)
    lora.add(model, SETTINGS, names=NAMES, rngs=nnx.Rngs(1))
    assert_close(run(model, given), before, relative=1e-6)  # adding zero, but in another program
    assert base_paths(model) == paths
    fill_adapter(model)
    assert relative_error(run(model, given), before) > 0.05
    lora.remove(model)
    np.testing.assert_array_equal(run(model, given), before)


def test_shapes_and_scale(adapted):
    layers = dict(lora.adapted(adapted))
    stacked, single = layers["blocks.ff.up"].lora, layers["patch_embed.proj"].lora
    assert (stacked.a.shape, stacked.b.shape) == ((DEPTH, 32, 4), (DEPTH, 4, 128))
    assert (single.a.shape, single.b.shape) == ((16, 4), (4, 32))
    assert stacked.scale == 0.5
    blocks = np.asarray(stacked.a[...])
    assert not np.array_equal(blocks[0], blocks[1])
    assert 0.9 * 32**-0.5 < np.abs(blocks).max() <= 32**-0.5


def test_merge_and_unmerge(adapted):
    given = inputs(references=1)
    expected, kernels = run(adapted, given), nnx.to_pure_dict(nnx.state(adapted, nnx.Param))
    kernels = jax.tree.map(np.asarray, kernels)
    held = lora.merge(adapted)
    assert not list(lora.adapted(adapted)) and len(held) == 10
    assert_close(run(adapted, given), expected, relative=1e-5)
    changed = nnx.to_pure_dict(nnx.state(adapted, nnx.Param))
    assert (
        relative_error(changed["blocks"]["attn1"]["to_q"]["kernel"], kernels["blocks"]["attn1"]["to_q"]["kernel"]) > 0.1
    )
    lora.unmerge(adapted, held)
    assert_close(run(adapted, given), expected, relative=1e-5)
    for found, kernel in zip(
        jax.tree.leaves(nnx.to_pure_dict(nnx.state(adapted, nnx.Param))), jax.tree.leaves(kernels), strict=True
    ):
        np.testing.assert_allclose(found, kernel, atol=1e-6)


def test_unmerge_of_another_model(adapted):
    held = lora.merge(adapted)
    with pytest.raises(UserError, match="the model has no layer elsewhere"):
        lora.unmerge(adapted, {"elsewhere": next(iter(held.values()))})


def test_split_holds_the_adapter_alone(adapted):
    graph, adapter, rest = lora.split(adapted)
    paths = [path for path, _ in nnx.to_flat_state(adapter)]
    assert len(paths) == 20 and {path[-2:] for path in paths} == {("lora", "a"), ("lora", "b")}
    assert not any("lora" in path for path, _ in nnx.to_flat_state(rest))
    np.testing.assert_array_equal(run(nnx.merge(graph, adapter, rest), inputs()), run(adapted, inputs()))


def test_gradients_reach_every_block_of_every_adapter(adapted):
    graph, adapter, rest = lora.split(adapted)
    latents, text, timesteps, reference = inputs(references=1)

    @jax.jit
    @jax.grad
    def gradient(adapter):
        return jnp.square(nnx.merge(graph, adapter, rest)(latents, text, timesteps, reference=reference)).mean()

    gradients = nnx.to_flat_state(gradient(adapter))
    assert [path for path, _ in gradients] == [path for path, _ in nnx.to_flat_state(adapter)]
    for path, leaf in gradients:
        axes = (-2, -1)
        assert np.all(np.abs(leaf[...]).max(axes) > 0), path


# MARK: dropout


def layer_with_adapter(dropout: float, *, stacked: int | None = None) -> Linear:
    """A linear layer whose base is zero, so that its output is the adapter's; A sums its input, B copies the sum."""
    layer = Linear(64, 3, bias=False, rngs=nnx.Rngs(0))
    lead = () if stacked is None else (stacked,)
    layer.kernel = nnx.Param(jnp.zeros((*lead, 64, 3)))
    layer.lora = LoRA(layer.kernel[...], rank=1, alpha=1.0, dropout=dropout, rngs=nnx.Rngs(0))
    layer.lora.a[...], layer.lora.b[...] = jnp.ones((*lead, 64, 1)) / 64, jnp.ones((*lead, 1, 3))
    return layer


def test_dropout_keeps_the_expectation_and_is_off_without_a_key():
    layer, x = layer_with_adapter(0.25), jnp.ones((4096, 64))
    np.testing.assert_allclose(layer(x), 1.0, rtol=1e-6)
    lora.set_dropout_key(layer, jax.random.key(0))
    y = np.asarray(layer(x))[:, 0]
    assert abs(y.mean() - 1) < 5 * y.std() / len(y) ** 0.5 < 0.01
    assert y.std() == pytest.approx((0.25 / 0.75 / 64) ** 0.5, rel=0.05)  # of a mean of 64 scaled coins
    np.testing.assert_array_equal(layer(x)[:, 0], y)
    lora.set_dropout_key(layer, None)
    np.testing.assert_allclose(layer(x), 1.0, rtol=1e-6)


def test_a_rate_of_zero_is_no_dropout():
    layer, x = layer_with_adapter(0.0), jnp.ones((5, 64))
    lora.set_dropout_key(layer, jax.random.key(0))
    np.testing.assert_allclose(layer(x), 1.0, rtol=1e-6)


def test_every_block_and_every_layer_has_a_key_of_its_own(adapted):
    lora.set_dropout_key(adapted, jax.random.key(5))
    keys = [jax.random.key_data(layer.lora.key[...]).reshape(-1, 2) for _, layer in lora.adapted(adapted)]
    flat = np.concatenate(keys)
    assert len(flat) == 8 * DEPTH + 2 == len(np.unique(flat, axis=0))


def test_blocks_of_a_stack_drop_different_inputs():
    layer = layer_with_adapter(0.5, stacked=4)
    lora.set_dropout_key(layer, jax.random.key(1))
    outputs = jax.lax.scan(lambda x, block: (x, block(x)), jnp.ones((8, 64)), layer)[1]
    assert len(np.unique(np.asarray(outputs)[..., 0].round(5), axis=0)) == 4


def test_dropout_in_the_model(adapted):
    given = inputs(references=1)
    still = run(adapted, given)
    lora.set_dropout_key(adapted, jax.random.key(0))
    first = run(adapted, given)
    assert relative_error(first, still) > 0.005
    lora.set_dropout_key(adapted, jax.random.key(1))
    assert relative_error(run(adapted, given), first) > 0.005
    lora.set_dropout_key(adapted, None)
    np.testing.assert_array_equal(run(adapted, given), still)
