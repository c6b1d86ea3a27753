"""What files call the layers of every published model, and what we call them for ComfyUI."""

import pytest

from sdv_jax.checkpoints.adapter_names import LayerNames, is_delta, parse
from sdv_jax.models.wan import original_names
from tests import published

KEYS = {
    "transformer.blocks.0.attn1.to_out.0.lora_A.weight": ("blocks.0.attn1.to_out.0", "A"),
    "transformer.blocks.0.attn1.to_out.0.lora.up.weight": ("blocks.0.attn1.to_out.0", "B"),
    "base_model.model.blocks.0.attn1.to_q.lora_B.weight": ("blocks.0.attn1.to_q", "B"),
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight": ("blocks.0.self_attn.q", "A"),
    "diffusion_model.blocks.0.self_attn.q.alpha": ("blocks.0.self_attn.q", "alpha"),
    "model.diffusion_model.blocks.0.ffn.0.lora_up.weight": ("blocks.0.ffn.0", "B"),
    "blocks.0.self_attn.q.lora_A.default.weight": ("blocks.0.self_attn.q", "A"),
    "pipe.dit.blocks.0.self_attn.q.lora_B.default.weight": ("blocks.0.self_attn.q", "B"),
    "lora_unet_blocks_0_self_attn_q.lora_down.weight": ("blocks_0_self_attn_q", "A"),
    "lora_unet__blocks_0_self_attn_q.lora_up.weight": ("blocks_0_self_attn_q", "B"),
    "lora_unet__blocks_0_self_attn_q.alpha": ("blocks_0_self_attn_q", "alpha"),
    "diffusion_model.blocks.0.norm3.diff": None,
    "diffusion_model.blocks.0.self_attn.q.diff_b": None,
    "diffusion_model.blocks.0.self_attn.q.dora_scale": None,
    "transformer.blocks.0.attn1.to_q.lora_B.bias": None,
    "diffusion_model.blocks.0.self_attn.q.lokr_w1": None,
    "lora_unet_blocks_0_self_attn_q.lora_mid.weight": None,
}


@pytest.mark.parametrize("key, found", KEYS.items(), ids=KEYS)
def test_keys(key, found):
    assert parse(key) == found
    assert is_delta(key) == key.endswith((".diff", ".diff_b", ".bias"))


MODELS = list(LayerNames.of_published())


@pytest.mark.parametrize("names", MODELS, ids=lambda names: names.family)
def test_every_linear_layer_of_every_published_model_is_found_by_each_of_its_names(names):
    spelled = {}
    for path, shape in names.layers():
        for block in (0, shape[0] - 1) if len(shape) == 3 else (None,):
            name = names.published(path, block)
            for known in {name, original_names.original_name(name) if names.family == "wan" else name}:
                for way in (known, known.replace(".", "_")):
                    assert names.find(way) == (path, block), way
                    assert spelled.setdefault(way, (path, block)) == (path, block)
    assert len(spelled) > 30


@pytest.mark.parametrize("absent", [
    "blocks_0_cross_attn_k_img", "blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj", "img_emb.proj.1", "norm3",
    "blocks.0.norm3", "blocks_0_norm3", "blocks.0.modulation", "blocks_x_self_attn_q", "blocks.self_attn.q", "",
])  # fmt: skip
def test_what_is_no_linear_layer_is_not_found(absent):
    assert [names.find(absent) for names in LayerNames.of_published("wan")] == [None] * 4


@pytest.mark.parametrize("original", [name for name in published.ORIGINALS if "transformer" in name])
def test_names_for_comfyui_are_those_of_the_original_weights(original):
    tensors = published.original(original)
    names = next(LayerNames.of_published("wan"))
    weights = [name for name in tensors if name.endswith(".weight") and names.find(name.removesuffix(".weight"))]
    assert len(weights) == 7 + 10 * (1 + max(int(name.split(".")[1]) for name in tensors if name[:7] == "blocks."))
    for weight in weights:
        module = names.published(*names.find(weight.removesuffix(".weight")))
        assert names.key(module, "A", "comfyui") == f"diffusion_model.{weight.removesuffix('.weight')}.lora_A.weight"
        assert names.key(module, "B", "diffusers") == f"transformer.{module}.lora_B.weight"


def test_names_for_comfyui_of_a_family_without_original_names_are_those_for_diffusers():
    names = next(LayerNames.of_published("cogvideox"))
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert names.key("transformer_blocks.0.attn1.to_q", "A", "comfyui") == key
    assert (names.renames("comfyui"), MODELS[-1].renames("comfyui")) == (False, True)
