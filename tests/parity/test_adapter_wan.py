"""Adapters of Wan against diffusers' loader, PEFT and ComfyUI's rule, in both directions."""

import copy
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files
from sdv_jax.models.wan import LORA_TARGETS, rules
from sdv_jax.models.wan.original_names import diffusers_name, original_name
from sdv_jax.models.wan.transformer import Transformer, TransformerConfig
from tests.checkpoints.adapter_tools import changed, filled, peft, put, randomised, refused, rename, tensors_of
from tests.parity.compare import assert_close, relative_error

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 6,
    "freq_dim": 8, "ffn_dim": 20, "num_layers": 3, "patch_size": (1, 2, 2),
}  # fmt: skip
RANK = 4
RULES = rules.transformer(SIZES["patch_size"])
OUTSIDE = ("proj_out", "time_proj", "time_embedder.linear_1", "text_embedder.linear_1", "text_embedder.linear_2")


def randomly(model, targets, alpha=RANK, **options):
    return peft(model, alpha=alpha, rank=RANK, targets=targets, **options)[0]


@pytest.fixture(scope="module")
def base() -> WanTransformer3DModel:
    return randomised(WanTransformer3DModel(**SIZES))


@pytest.fixture
def theirs(base):
    return copy.deepcopy(base)


@pytest.fixture
def ours(base) -> Transformer:
    config = TransformerConfig(**SIZES)
    return filled(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), RULES, base)


def pipeline(transformer) -> WanPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)


def inputs():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 4, 6, 4)).astype(np.float32)
    return latents, rng.standard_normal((2, 5, 6)).astype(np.float32), np.array([3, 700])


def run_theirs(model) -> np.ndarray:
    latents, text, times = map(torch.tensor, inputs())
    with torch.no_grad():
        out = model(latents.permute(0, 4, 1, 2, 3), times, text).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


_forward = jax.jit(lambda model, *inputs: model(*inputs))


def run_ours(model) -> np.ndarray:
    return np.asarray(_forward(model, *map(jnp.asarray, inputs())))


# MARK: what we write


@pytest.fixture
def trained(ours, request) -> Transformer:
    """Our model with an adapter at alpha = 3/4 rank, A and B at random."""
    config = lora.LoraConfig(rank=RANK, alpha=0.75 * RANK, targets=LORA_TARGETS + getattr(request, "param", ()))
    lora.add(ours, config, names=RULES.to_torch_module_name, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for _, layer in lora.adapted(ours):
        layer.lora.b.set_value(jnp.asarray(rng.normal(0, 0.3, layer.lora.b.shape), jnp.float32))
    return ours


@pytest.mark.parametrize("trained", [(), OUTSIDE], ids=["blocks", "and outside"], indirect=True)
@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_wan_pipeline_loads_what_we_export(base, theirs, trained, tmp_path, format):
    adapter_files.save(trained, tmp_path / "adapter", targets=LORA_TARGETS)
    adapter_files.export(tmp_path / "adapter", tmp_path / "out" / "any.safetensors", format=format)
    pipeline(theirs).load_lora_weights(tmp_path / "out", weight_name="any.safetensors")
    assert_close(run_theirs(theirs), run_ours(trained), relative=1e-4)
    assert relative_error(run_theirs(base), run_ours(trained)) > 0.1


def test_wan_pipeline_loads_the_training_folder_itself(theirs, trained, tmp_path):
    adapter_files.save(trained, tmp_path / "adapter", reference={"placement": "after", "offset": 1, "shift": 1.0})
    pipeline(theirs).load_lora_weights(tmp_path / "adapter")
    assert_close(run_theirs(theirs), run_ours(trained), relative=1e-4)


def test_the_patch_embedding_is_the_convolution_that_it_is_there(theirs, ours, tmp_path, caplog):
    config = lora.LoraConfig(rank=RANK, alpha=RANK, targets=("patch_embedding",))
    lora.add(ours, config, names=RULES.to_torch_module_name, rngs=nnx.Rngs(0))
    layer = ours.patch_embedding.lora
    layer.b.set_value(jnp.asarray(np.random.default_rng(0).normal(0, 0.3, layer.b.shape), jnp.float32))
    adapter_files.save(ours, tmp_path)
    pipeline(theirs).load_lora_weights(tmp_path)
    assert_close(run_theirs(theirs), run_ours(ours), relative=1e-4)
    # By its original name diffusers does not know it, and says so, as do we.
    adapter_files.export(tmp_path, tmp_path / "comfyui.safetensors", format="comfyui")
    assert "diffusers does not read an adapter of these layers in this style" in caplog.text
    with pytest.raises(ValueError):
        pipeline(theirs).load_lora_weights(tmp_path, weight_name="comfyui.safetensors")


@pytest.mark.parametrize("trained", [OUTSIDE], indirect=True, ids=[""])
def test_peft_loads_what_we_export(theirs, trained, tmp_path):
    adapter_files.save(trained, tmp_path / "adapter")
    adapter_files.export(tmp_path / "adapter", tmp_path / "peft" / "adapter_model.safetensors", format="peft")
    model = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    assert_close(run_theirs(model), run_ours(trained), relative=1e-4)


@pytest.mark.parametrize("trained", [OUTSIDE], indirect=True, ids=[""])
def test_comfyui_patches_the_original_weights_with_what_we_export(base, theirs, trained, tmp_path):
    """ComfyUI's rule: `diffusion_model.X` is about the tensor X.weight of the original file; alpha / r is 1 without."""
    adapter_files.save(trained, tmp_path / "adapter")
    adapter_files.export(tmp_path / "adapter", tmp_path / "out.safetensors", format="comfyui")
    tensors = load_file(tmp_path / "out.safetensors")
    original = {original_name(name): value for name, value in base.state_dict().items()}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        down, up = (torch.tensor(tensors.pop(f"{name}.lora_{half}.weight")) for half in "AB")
        weight = name.removeprefix("diffusion_model.") + ".weight"
        original[weight] = original[weight] + up @ down
    assert not tensors
    theirs.load_state_dict({diffusers_name(name): value for name, value in original.items()})
    assert_close(run_theirs(theirs), run_ours(trained), relative=1e-4)


@pytest.mark.parametrize("format", adapter_files.FORMATS)
def test_what_we_export_we_load(trained, tmp_path, format):
    expected = run_ours(trained)
    adapter_files.save(trained, tmp_path / "adapter")
    out = tmp_path / "out" / "any.safetensors"
    adapter_files.export(tmp_path / "adapter", out, format=format)
    lora.remove(trained)
    adapter_files.load(trained, out)
    assert_close(run_ours(trained), expected, relative=1e-5)


# MARK: what others write


@pytest.mark.parametrize("metadata", [False, True], ids=["", "metadata"])
def test_file_that_diffusers_writes(theirs, ours, tmp_path, metadata):
    model, config = peft(theirs, alpha=RANK / 2 if metadata else RANK, rank=RANK, targets=LORA_TARGETS)
    stated = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items() if v is not None}
    WanPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(model), transformer_lora_adapter_metadata=stated if metadata else None
    )
    adapter_files.load(ours, tmp_path)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)


def test_folder_that_peft_writes(theirs, ours, tmp_path):
    config = LoraConfig(r=RANK, lora_alpha=RANK / 2, target_modules=list(LORA_TARGETS), init_lora_weights=False)
    model = PeftModel(theirs, config).eval()
    model.save_pretrained(tmp_path)
    adapter_files.load(ours, tmp_path)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)
    file = tmp_path / "adapter_model.safetensors"  # and now as diffusion-pipe names the tensors
    save_file({f"diffusion_model.{_original(key)}": value for key, value in load_file(file).items()}, file)
    adapter_files.load(ours, tmp_path)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)


@pytest.fixture
def written(theirs, tmp_path):
    """A file with alpha = rank for all ten layers of each block, and what the adapted model answers."""
    model = randomly(theirs, LORA_TARGETS)
    save_file(tensors_of(model), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors", run_theirs(model)


def _original(key: str) -> str:
    """A key of diffusers' or PEFT's with the module's original name and no prefix."""
    module, half = key.removeprefix("transformer.").removeprefix("base_model.model.").split(".lora_")
    return f"{original_name(module)}.lora_{half}"


def _up_down(key: str) -> str:
    return key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


def _flat(key: str) -> str:
    module, half = _up_down(key).split(".lora_")
    return f"{module.replace('.', '_')}.lora_{half}"


STYLES = {
    "ComfyUI": lambda key: "diffusion_model." + _original(key),
    "ComfyUI, up and down": lambda key: "diffusion_model." + _up_down(_original(key)),
    "checkpoint": lambda key: "model.diffusion_model." + _original(key),
    "musubi": lambda key: "lora_unet_" + _flat(_original(key)),
    "Fun": lambda key: "lora_unet__" + _flat(_original(key)),
    "Fun, diffusers' names": lambda key: "lora_unet__" + _flat(key.removeprefix("transformer.")),
    "DiffSynth": lambda key: _original(key).replace(".weight", ".default.weight"),
    "DiffSynth, pipe": lambda key: "pipe.dit." + _original(key),
    "old diffusers": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
}
READ_BY_DIFFUSERS = ("ComfyUI", "ComfyUI, up and down", "musubi", "old diffusers")


def styled(style, *, alpha=None):
    """Renames every tensor, and adds an alpha for every module if one is given."""

    def change(tensors):
        for key in list(tensors):
            new = STYLES[style](key)
            tensors[new] = tensors.pop(key)
            if alpha is not None:
                tensors[new.split(".lora")[0] + ".alpha"] = np.asarray(alpha)

    return change


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_the_same_adapter(written, ours, style):
    path, expected = written
    adapter_files.load(ours, changed(path, styled(style)))
    assert_close(run_ours(ours), expected, relative=1e-4)


@pytest.mark.parametrize("alpha", [np.float32(2), jnp.bfloat16(2), np.int64(2)], ids=lambda alpha: str(alpha.dtype))
@pytest.mark.parametrize("style", [style for style in READ_BY_DIFFUSERS if style != "old diffusers"])
def test_alpha_counts_as_it_does_in_diffusers(written, base, ours, style, alpha):
    file = changed(written[0], styled(style, alpha=alpha))
    theirs = copy.deepcopy(base)
    pipeline(theirs).load_lora_weights(file.parent, weight_name=file.name)
    adapter_files.load(ours, file)
    assert_close(run_ours(ours), run_theirs(theirs), relative=1e-4)
    assert relative_error(run_ours(ours), written[1]) > 0.1
    # The same in another spelling, which diffusers does not read.
    adapter_files.load(ours, changed(written[0], styled("Fun", alpha=alpha)))
    assert_close(run_ours(ours), run_theirs(theirs), relative=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_a_foreign_file_is_exported_to_what_diffusers_loads(written, base, tmp_path, style):
    path, expected = written
    file = changed(path, styled(style, alpha=RANK))
    for format in ("diffusers", "comfyui"):
        out = tmp_path / f"{format}.safetensors"
        adapter_files.export(file, out, format=format)
        theirs = copy.deepcopy(base)
        pipeline(theirs).load_lora_weights(tmp_path, weight_name=out.name)
        assert_close(run_theirs(theirs), expected, relative=1e-4)


def test_some_blocks_and_targets_only(base, ours, tmp_path, caplog):
    model = randomly(copy.deepcopy(base), ["blocks.1.attn1.to_q", "blocks.2.ffn.net.2"])
    save_file(tensors_of(model), tmp_path / "part.safetensors")
    with caplog.at_level(logging.WARNING, logger="sdv_jax"):
        adapter_files.load(ours, changed(tmp_path / "part.safetensors", styled("musubi")))
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)
    (record,) = caplog.records
    assert "1 of 3 in blocks.attn1.to_q; 1 of 3 in blocks.ffn.down" in record.getMessage()


# MARK: what is refused


IMAGE = "diffusion_model.blocks.0.cross_attn.k_img"
LEFTOVERS = {
    "image-to-video": (
        lambda t: t.update({f"{IMAGE}.lora_{half}.weight": np.ones((4, 4), np.float32) for half in ("down", "up")}),
        "adapts modules that are not in this model: blocks.0.cross_attn.k_img",
    ),
    "image-to-video, underscores": (
        rename("diffusion_model.blocks.1.cross_attn.v.", "lora_unet_blocks_1_cross_attn_v_img."),
        "adapts modules that are not in this model: blocks_1_cross_attn_v_img",
    ),
    "image embedding": (
        rename("diffusion_model.blocks.0.ffn.0.", "diffusion_model.img_emb.proj.1."),
        "adapts modules that are not in this model: img_emb.proj.1",
    ),
    "bias": (
        put("diffusion_model.blocks.0.self_attn.q.diff_b", np.ones(24, np.float32)),
        "these keys are not those of a LoRA: diffusion_model.blocks.0.self_attn.q.diff_b",
    ),
    "norm": (
        put("diffusion_model.blocks.0.norm3.diff", np.ones(24, np.float32)),
        "these keys are not those of a LoRA: diffusion_model.blocks.0.norm3.diff",
    ),
    "another block": (
        rename("blocks.2.ffn.0.", "blocks.30.ffn.0."), "not in this model: blocks.30.ffn.0 (the model has 3 blocks)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", LEFTOVERS.values(), ids=LEFTOVERS)
def test_leftovers_are_named(written, ours, change, message):
    file = changed(written[0], styled("ComfyUI, up and down"))
    refused(message, adapter_files.load, ours, changed(file, change))
    assert not list(lora.adapted(ours))
