"""The tables against the published checkpoints' tensor lists, and the engine's strictness on a toy."""

import functools
import pathlib

import numpy as np
import pytest

from sdv_jax.checkpoints.engine import leaves_of, match, problems_between
from sdv_jax.checkpoints.rules.table import CONV2D, CONV3D, LINEAR, SAME, Rule, Rules, patches
from sdv_jax.checkpoints.safetensors_io import Tensor
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox import VARIANTS
from sdv_jax.models.cogvideox import rules as cogvideox
from sdv_jax.models.cogvideox.family import FAMILY as COGVIDEOX
from tests.published import tensors


@functools.cache
def built(model: str, part: str):
    component = COGVIDEOX.components[part]
    config = getattr(VARIANTS[model], part)
    return component.leaves(config), component.rules(config)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("proj_out.bias"), "missing proj_out.bias"),
        (lambda t: t.update({"extra.weight": (3, 3)}), "unexpected extra.weight"),
        (lambda t: t.update({"proj_out.bias": (7,)}), "proj_out.bias has shape (7,), expected (64,)"),
        (
            lambda t: t.update({"transformer_blocks.42.attn1.to_q.weight": (3072, 3072)}),
            "unexpected transformer_blocks.42",
        ),
    ],
)
def test_published_list_with_one_mistake_is_refused(damage, message):
    shapes = tensors("CogVideoX-5b", "transformer")
    damage(shapes)
    (problem,) = problems_between(*_swap(built("CogVideoX-5b", "transformer"), shapes))
    assert message in problem


def _swap(pair, shapes):
    leaves, rules = pair
    return leaves, shapes, rules


@pytest.mark.parametrize(
    "transform, shape",
    [(SAME, (5,)), (LINEAR, (5, 3)), (CONV2D, (5, 3, 2, 4)), (CONV3D, (5, 3, 2, 4, 6)), (patches(2), (5, 3, 2, 2))],
)
def test_transforms_are_inverses(transform, shape):
    x = np.random.default_rng(0).standard_normal(shape)
    np.testing.assert_array_equal(transform.to_torch(transform.to_ours(x)), x)


def test_patch_kernel_is_row_major_with_channels_last():
    x = np.random.default_rng(0).standard_normal((5, 3, 2, 2))  # d, c, p, p
    kernel = patches(2).to_ours(x)
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                np.testing.assert_array_equal(kernel[(row * 2 + column) * 3 + channel], x[:, channel, row, column])


def test_module_names():
    rules = cogvideox.transformer()
    pairs = {
        ("blocks.attn1.to_q", 3): "transformer_blocks.3.attn1.to_q",
        ("blocks.attn1.to_out", 0): "transformer_blocks.0.attn1.to_out.0",
        ("blocks.ff.up", 11): "transformer_blocks.11.ff.net.0.proj",
        ("blocks.ff.down", 1): "transformer_blocks.1.ff.net.2",
        ("blocks.norm2.linear", 2): "transformer_blocks.2.norm2.linear",
        ("patch_embed.proj", None): "patch_embed.proj",
        ("patch_embed.text_proj", None): "patch_embed.text_proj",
        ("norm_out.linear", None): "norm_out.linear",
    }
    for (path, layer), name in pairs.items():
        assert rules.to_torch_module_name(path, layer) == name
        assert rules.from_torch_module_name(name) == (path, layer)
    for wrong in ("transformer_blocks.0.attn1.norm_q", "transformer_blocks.x.attn1.to_q", "nothing"):
        with pytest.raises(KeyError):
            rules.from_torch_module_name(wrong)
    with pytest.raises(KeyError):
        rules.to_torch_module_name("blocks.attn1.to_q")  # which layer?


TOY = Rules(
    table=(Rule("layers.{l}.{name:a|b}.weight", "blocks.{name}.kernel", LINEAR), Rule("head.weight", "head.scale")),
    ignore=(r"ema\..*",),
    aliases={"tail.weight": "head.weight"},
)
TOY_SHAPES = {"blocks.a.kernel": (2, 3, 4), "blocks.b.kernel": (2, 4, 3), "head.scale": (5,)}


def toy_tensors(**changes) -> dict[str, Tensor]:
    shapes = {
        "layers.0.a.weight": (4, 3),
        "layers.1.a.weight": (4, 3),
        "layers.0.b.weight": (3, 4),
        "layers.1.b.weight": (3, 4),
        "head.weight": (5,),
    }
    shapes = {name: shape for name, shape in (shapes | changes).items() if shape}
    return {name: Tensor(pathlib.Path("x"), name, np.dtype(np.float32), shape, 0) for name, shape in shapes.items()}


def test_toy_matches_with_ignored_tensors_and_aliases():
    leaves = leaves_of(TOY_SHAPES, TOY)
    source = match(
        toy_tensors(**{"ema.decay": (1,), "head.weight": None, "tail.weight": (5,)}), leaves, TOY, where="toy"
    )
    assert source.tensors["head.weight"].name == "tail.weight"
    assert [t.name for t in source.tied["head.weight"]] == ["tail.weight"]
    assert [leaf.names for leaf in leaves][0] == ("layers.0.a.weight", "layers.1.a.weight")


def test_all_mistakes_are_listed_in_one_line():
    wrong = toy_tensors(**{"layers.1.a.weight": None, "layers.0.b.weight": (4, 4), "head.extra": (1,)})
    with pytest.raises(UserError) as error:
        match(wrong, leaves_of(TOY_SHAPES, TOY), TOY, where="toy")
    line = str(error.value)
    assert "\n" not in line and line.startswith("toy: ")
    assert (
        "missing layers.1.a.weight (4, 3)" in line
        and "unexpected head.extra" in line
        and "layers.0.b.weight has shape (4, 4), expected (3, 4)" in line
    )


def test_a_leaf_without_a_rule_is_a_mistake_of_the_table():
    with pytest.raises(AssertionError, match="no conversion rule names nothing.kernel"):
        leaves_of({"nothing.kernel": (1,)}, TOY)
