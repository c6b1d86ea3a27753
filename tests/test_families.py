"""Every family × variant, at its real size and without memory: what the contract promises holds for each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sdv_jax.adapters import lora
from sdv_jax.checkpoints.engine import leaf_shapes, leaves_of, problems_between
from sdv_jax.checkpoints.families import families, family_of_module, rules_of
from sdv_jax.sharding import dotted, spec_of
from tests import published

FAMILIES = {family.name: family for family in families()}
# Elements of the published safetensors; 1.5-I2V's of diffusers' model on the meta device, its own are not known.
PARAMETERS = {
    ("CogVideoX-2b", "transformer"): 1_693_783_872,
    ("CogVideoX-5b", "transformer"): 5_570_283_072,
    ("CogVideoX-5b-I2V", "transformer"): 5_570_479_680 + 17_776 * 3_072,  # learned positions are a buffer there
    ("CogVideoX1.5-5B", "transformer"): 5_570_676_352,
    ("CogVideoX1.5-5B-I2V", "transformer"): 5_571_594_880,
    ("Wan2.1-T2V-1.3B", "transformer"): 1_418_996_800,
    ("Wan2.1-T2V-14B", "transformer"): 14_288_491_584,
    ("Wan2.2-T2V-A14B", "transformer"): 14_288_491_584,
    ("Wan2.2-T2V-A14B", "transformer_2"): 14_288_491_584,
    ("Wan2.2-TI2V-5B", "transformer"): 4_999_787_712,
    ("Wan2.2-TI2V-5B", "vae"): 704_688_668,
}
SHARED = {("cogvideox", "vae"): 215_583_907, ("cogvideox", "text_encoder"): 4_762_310_656,
          ("wan", "vae"): 126_892_531, ("wan", "text_encoder"): 5_680_910_336}  # fmt: skip

# What an adapter acts on in each block, as paper A has it.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
ADAPTED = {
    "cogvideox": {*(f"attn1.{part}" for part in _ATTENTION), "norm1.linear", "norm2.linear", "ff.up", "ff.down"},
    "wan": {f"{attn}.{part}" for attn in ("attn1", "attn2") for part in _ATTENTION} | {"ffn.up", "ffn.down"},
}
SMALL = 10**9  # parameters up to which a denoiser may as well lie whole on every device

PARTS = [
    (family.name, variant, part)
    for family in FAMILIES.values()
    for variant, config in family.variants.items()
    for part in family.components
    if getattr(config, part, None) is not None
]
VARIANTS = [(family.name, variant) for family in FAMILIES.values() for variant in family.variants]


def checkpoint(variant: str) -> str | None:
    """The published list of a variant's tensors; none is known of CogVideoX1.5-5B-I2V."""
    return next((name for name in published.CHECKPOINTS if name.removesuffix("-Diffusers") == variant), None)


@functools.cache
def built(family: str, variant: str, part: str):
    """(module of shapes, its leaves, its rules)."""
    component, config = FAMILIES[family].components[part], getattr(FAMILIES[family].variants[variant], part)
    module = component.abstract(config, dtype=jnp.bfloat16)
    return module, leaves_of(leaf_shapes(nnx.state(module)), component.rules(config)), component.rules(config)


def test_no_variant_is_forgotten():
    assert {name.removesuffix("-Diffusers") for name in published.CHECKPOINTS} <= {name for _, name in VARIANTS}
    assert set(PARAMETERS) <= {(variant, part) for _, variant, part in PARTS}


@pytest.mark.parametrize(("family", "variant", "part"), PARTS)
def test_parameters(family, variant, part):
    _, leaves, _ = built(family, variant, part)
    expected = PARAMETERS.get((variant, part)) or SHARED[family, part]
    assert sum(math.prod(leaf.shape) for leaf in leaves) == expected


@pytest.mark.parametrize(("family", "variant", "part"), PARTS)
def test_every_leaf_has_a_place(family, variant, part):
    """A row whose axes exist. Eight devices share a denoiser but for a hundredth, a text encoder but for its words."""
    module, _, _ = built(family, variant, part)
    table, cut, total = FAMILIES[family].placement(part), 0, 0
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        spec = spec_of(dotted(path), table)
        assert len(spec) <= leaf.ndim, path
        axes = [axis for axis, name in enumerate(spec) if name == "fsdp"]
        assert all(leaf.shape[axis] % 8 == 0 for axis in axes), path
        total, cut = total + leaf.size, cut + leaf.size * bool(axes)
    if total > SMALL:
        assert cut / total > (0.985 if part in FAMILIES[family].denoisers else 0.8)


@pytest.mark.parametrize(("family", "variant", "part"), PARTS)
def test_published_configs_and_tensors(family, variant, part):
    """The published config is the variant's, and every published tensor has one leaf, of its shape, and back."""
    name = checkpoint(variant)
    if name is None:
        pytest.skip("no list of its tensors is known")
    config = FAMILIES[family].components[part].parse(published.config(name, part), name)
    assert config == getattr(FAMILIES[family].variants[variant], part)
    _, leaves, rules = built(family, variant, part)
    shapes = published.tensors(name, part)
    for alias, first in rules.aliases.items():
        assert shapes.pop(alias) == shapes[first]
    assert problems_between(leaves, shapes, rules) == []
    names = [tensor for leaf in leaves for tensor in leaf.names]
    assert len(names) == len(set(names)) == len(shapes)
    by_path = {leaf.path: leaf for leaf in leaves}
    for tensor, shape in shapes.items():
        [(rule, path, layer)] = [(rule, *rule.path(tensor)) for rule in rules.table if rule.path(tensor)]
        assert rule.torch_name(path, layer) == tensor and by_path[path].names[layer or 0] == tensor
        ours = rule.transform.to_ours(np.broadcast_to(np.int8(0), shape))
        assert ours.shape == (by_path[path].shape[1:] if rule.stacked else by_path[path].shape)
        assert rule.transform.to_torch(ours).shape == shape


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_lora_targets_resolve(family, variant):
    """To the layers they mean, in every block; and the adapter's leaves have a place."""
    chosen = FAMILIES[family]

    def build():
        model = chosen.components[chosen.denoiser].module(chosen.variants[variant].transformer, rngs=nnx.Rngs(0))
        settings = lora.LoraConfig(rank=128, alpha=64, targets=chosen.lora_targets)
        lora.add(model, settings, names=rules_of(model)[1].to_torch_module_name, rngs=nnx.Rngs(0))
        return model

    model = nnx.eval_shape(build)
    assert family_of_module(model) is chosen
    adapted, rules = {path for path, _ in lora.adapted(model)}, rules_of(model)[1]
    if family in ADAPTED:
        assert {path for path in adapted if path.startswith("blocks.")} == {f"blocks.{x}" for x in ADAPTED[family]}
    stacked = {path: rules.of_path(f"{path}.kernel").stacked for path in adapted}
    names = [rules.to_torch_module_name(path, 0 if stacked[path] else None) for path in adapted]
    for target in chosen.lora_targets:
        assert any(f".{name}".endswith(f".{target}") for name in names), target
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        assert len(spec_of(dotted(path), chosen.sharding)) <= leaf.ndim


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_traits_and_one_call_with_a_reference(family, variant):
    """At the default size, abstractly: what goes in is what the traits say, what comes out is of its shape."""
    chosen, config = FAMILIES[family], FAMILIES[family].variants[variant]
    configs = {part: getattr(config, part) for part in chosen.components if getattr(config, part, None) is not None}
    index = published.config(checkpoint(variant), "model_index") if checkpoint(variant) else {}
    traits = chosen.traits(configs, {"variant": variant, "model_index": index})
    g = traits.geometry
    frames, *rest = g.latent_shape(g.num_frames, g.height, g.width)
    frames += g.surplus(frames)
    model = chosen.components[chosen.denoiser].abstract(configs[chosen.denoiser], dtype=jnp.bfloat16)

    def shape(*size):
        return jax.ShapeDtypeStruct(size, jnp.bfloat16)

    options = chosen.options("all", None)
    given = {"reference": shape(1, 2, *rest)} | ({"image": shape(1, 1, *rest)} if traits.image_latents else {})
    latents, text = shape(1, frames, *rest), shape(1, traits.text_length, traits.text_width)
    out = nnx.eval_shape(
        lambda m, x, s, t, given: m(x, s, t, **given, **options), model, latents, text, shape(1), given
    )
    assert (out.shape, out.dtype) == ((1, frames, *rest), jnp.bfloat16)
    assert (traits.image_latents is not None) == (variant.endswith("I2V") or "TI2V" in variant)
    assert (traits.boundary is not None) == ("A14B" in variant)
    assert chosen.variant(configs) == variant


def test_defaults_of_the_published_models():
    """Sizes, frames and rates as the releases sample (frames, height, width, steps, guidance, fps)."""
    expected = {
        "CogVideoX-2b": (49, 480, 720, 50, 6.0, 8), "CogVideoX1.5-5B": (81, 768, 1360, 50, 6.0, 16),
        "Wan2.1-T2V-1.3B": (81, 480, 832, 50, 5.0, 16), "Wan2.2-TI2V-5B": (121, 704, 1280, 50, 5.0, 24),
        "Wan2.2-T2V-A14B": (81, 720, 1280, 40, 4.0, 16),
    }  # fmt: skip
    for variant, wanted in expected.items():
        chosen = next(family for family in FAMILIES.values() if variant in family.variants)
        config = chosen.variants[variant]
        configs = {part: getattr(config, part) for part in ("transformer", "vae", "text_encoder")}
        t = chosen.traits(configs, {"variant": variant})
        g = t.geometry
        assert (g.num_frames, g.height, g.width, t.steps, t.guidance, t.fps) == wanted, variant
