"""Adapter files against the tools that write and read them, PEFT and diffusers."""

import copy
import dataclasses
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files
from sdv_jax.checkpoints.adapter_files import WEIGHTS
from sdv_jax.models.cogvideox import VARIANTS
from sdv_jax.models.cogvideox import rules as cogvideox
from tests.checkpoints.adapter_tools import (
    NAMES,
    PAPER,
    RANK,
    SIZES,
    changed,
    peft,
    refused,
    run_ours,
    run_theirs,
    tensors_of,
)
from tests.parity.compare import assert_close, relative_error

# MARK: what other tools write


def test_targets_hit_the_modules_that_peft_hits(theirs, ours):
    model, _ = peft(theirs)
    hit = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    lora.add(ours, lora.LoraConfig(rank=RANK, alpha=RANK, targets=PAPER), names=NAMES, rngs=nnx.Rngs(0))
    rules = cogvideox.transformer(2)
    mine = {
        rules.to_torch_module_name(path, index)
        for path, layer in lora.adapted(ours)
        for index in (range(SIZES["num_layers"]) if layer.kernel.ndim == 3 else [None])
    }
    assert mine == hit
    assert {"patch_embed.proj", "patch_embed.text_proj", "transformer_blocks.2.ff.net.0.proj"} <= mine
    assert not any("norm_out" in name or "proj_out" in name or "time_embedding" in name for name in mine)


def test_the_adapter_changes_the_output(written, base):
    assert relative_error(written[1], run_theirs(base)) > 0.1


@pytest.mark.parametrize("alpha", [None, RANK, RANK / 2, 3.0])
def test_released_file_with_alpha_from_the_user(base, ours, tmp_path, alpha):
    model, _ = peft(copy.deepcopy(base), alpha=RANK if alpha is None else alpha)
    path = tmp_path / "pytorch_lora_weights_transformer.safetensors"
    save_file(tensors_of(model), path)
    info = adapter_files.load(ours, path, alpha=alpha)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)
    assert (info.rank, info.alpha, info.adaln_lora) == (RANK, alpha or RANK, "all")


def _flat(key, prefix):
    module, half = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".", 1)
    return prefix + module.replace(".", "_") + {"lora_A": ".lora_down", "lora_B": ".lora_up"}[half] + ".weight"


DIALECTS = {
    "transformer.": lambda key: key,
    "bare": lambda key: key.removeprefix("transformer."),
    "PEFT": lambda key: key.replace("transformer.", "base_model.model.", 1),
    "PEFT inside transformer": lambda key: key.replace("transformer.", "transformer.base_model.model.", 1),
    "adapter name": lambda key: key.replace(".weight", ".default.weight"),
    "diffusion_model.": lambda key: key.replace("transformer.", "diffusion_model.", 1),
    "lora_down, lora_up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "lora.down, lora.up": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "VideoX-Fun": lambda key: _flat(key, "lora_unet__"),
    "kohya": lambda key: _flat(key, "lora_unet_"),
    "DiffSynth": lambda key: key.replace("transformer.", "pipe.dit.", 1).replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("rename", DIALECTS.values(), ids=DIALECTS)
def test_other_spellings_of_the_same_file_load_the_same(written, ours, rename):
    path, _ = written
    adapter_files.load(ours, path)
    expected = nnx.to_flat_state(nnx.state(ours, nnx.LoRAParam))
    tensors = {rename(key): value for key, value in load_file(path).items()}
    renamed = path.with_name("renamed.safetensors")
    save_file(tensors, renamed)
    adapter_files.load(ours, renamed)
    for (where, a), (_, b) in zip(expected, nnx.to_flat_state(nnx.state(ours, nnx.LoRAParam)), strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(where))


WITH_METADATA = {
    "alpha": {"alpha": RANK / 2},
    "rslora": {"alpha": 6, "use_rslora": True},
    "patterns": {
        "alpha": RANK / 2,
        "rank_pattern": {"to_q": 2, "transformer_blocks.1.norm1.linear": 3},
        "alpha_pattern": {"to_q": 7, "proj": 1},
    },
    "few targets": {"alpha": 2, "targets": ("to_k", "proj")},
}


@pytest.mark.parametrize("options", WITH_METADATA.values(), ids=WITH_METADATA)
def test_file_with_diffusers_metadata(theirs, ours, tmp_path, options):
    model, config = peft(theirs, **options)
    layers, metadata = get_peft_model_state_dict(model), _metadata(config)
    CogVideoXPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )
    adapter_files.load(ours, tmp_path)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)


def _metadata(config) -> dict:
    raw = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in raw.items() if value is not None}


def test_folder_that_peft_writes(theirs, ours, tmp_path):
    config = LoraConfig(r=RANK, lora_alpha=RANK / 2, target_modules=list(PAPER), init_lora_weights=False)
    model = PeftModel(theirs, config).eval()
    model.save_pretrained(tmp_path)
    adapter_files.load(ours, tmp_path)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64, np.int64, np.int32, np.uint8])
def test_alpha_tensors(written, ours, dtype):
    path, _ = written

    def alphas(tensors):
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            shape = (1,) if "to_k" in key else ()
            tensors[key.removesuffix("lora_A.weight") + "alpha"] = np.full(shape, RANK / 2, dtype)

    adapter_files.load(ours, path, alpha=RANK / 2)
    expected = run_ours(ours)
    adapter_files.load(ours, changed(path, alphas))
    np.testing.assert_array_equal(run_ours(ours), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.float8_e4m3fn])
def test_narrow_file(written, ours, dtype):
    path, expected = written

    def narrow(tensors):
        for key in tensors:
            tensors[key] = tensors[key].astype(dtype)

    adapter_files.load(ours, changed(path, narrow))
    assert next(iter(lora.adapted(ours)))[1].lora.a.dtype == jnp.float32
    assert 0 < relative_error(run_ours(ours), expected) < (0.05 if np.dtype(dtype).itemsize > 1 else 0.3)


def test_a_file_for_some_blocks_leaves_the_others_and_says_so(base, ours, tmp_path, caplog):
    model, _ = peft(copy.deepcopy(base), targets=["transformer_blocks.1.attn1.to_q", "patch_embed.proj"])
    save_file(tensors_of(model), tmp_path / "part.safetensors")
    with caplog.at_level(logging.WARNING, logger="sdv_jax"):
        adapter_files.load(ours, tmp_path)
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)
    (record,) = caplog.records
    assert "1 of 3 in blocks.attn1.to_q" in record.getMessage()
    assert sorted(path for path, _ in lora.adapted(ours)) == ["blocks.attn1.to_q", "patch_embed.proj"]


def test_loading_replaces_what_was_there(written, ours):
    lora.add(ours, lora.LoraConfig(rank=2, alpha=2, targets=("proj_out",)), names=NAMES, rngs=nnx.Rngs(0))
    adapter_files.load(ours, written[0])
    assert_close(run_ours(ours), written[1], relative=1e-4)


# MARK: what we write


def test_save_and_load_is_the_same_adapter(trained, tmp_path):
    expected = run_ours(trained)
    before = {path: layer.lora for path, layer in lora.adapted(trained)}
    adapter_files.save(trained, tmp_path / "adapter", targets=PAPER, adaln_lora="reference", variant="tiny", base="abc")
    lora.remove(trained)
    info = adapter_files.load(trained, tmp_path / "adapter")
    assert info == adapter_files.AdapterInfo(RANK, 3.0, PAPER, "reference", "cogvideox", "tiny", "abc", None)
    after = {path: layer.lora for path, layer in lora.adapted(trained)}
    assert before.keys() == after.keys()
    for path in before:
        assert after[path].scale == before[path].scale == 0.75
        np.testing.assert_array_equal(after[path].a[...], before[path].a[...])
        np.testing.assert_allclose(after[path].b[...], before[path].b[...], rtol=2e-7)
    assert_close(run_ours(trained), expected, relative=1e-6)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == ["adapter.json", WEIGHTS]


@pytest.mark.parametrize("stated", [True, False], ids=["metadata", "metadata ignored"])
@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_diffusers_pipeline_loads_what_we_export(trained, theirs, tmp_path, format, stated):
    adapter_files.save(trained, tmp_path / "adapter", targets=PAPER)
    out = tmp_path / "out" / WEIGHTS
    adapter_files.export(tmp_path / "adapter", out, format=format)
    if not stated:  # as a loader does that knows nothing of the header's entry
        save_file(load_file(out), out)
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs, scheduler=CogVideoXDDIMScheduler()
    )
    pipeline.load_lora_weights(out.parent)
    assert_close(run_theirs(theirs), run_ours(trained), relative=1e-4)


def test_diffusers_loads_the_training_folder_itself(trained, theirs, tmp_path):
    adapter_files.save(trained, tmp_path / "adapter")
    theirs.load_lora_adapter(tmp_path / "adapter", weight_name=WEIGHTS)
    assert_close(run_theirs(theirs), run_ours(trained), relative=1e-4)


def test_peft_loads_what_we_export(trained, theirs, tmp_path):
    adapter_files.save(trained, tmp_path / "adapter")
    adapter_files.export(tmp_path / "adapter", tmp_path / "peft" / "adapter_model.safetensors", format="peft")
    model = PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    assert_close(run_theirs(model), run_ours(trained), relative=1e-4)


@pytest.mark.parametrize("format", adapter_files.FORMATS)
def test_what_we_export_we_load(trained, tmp_path, format):
    expected = run_ours(trained)
    adapter_files.save(trained, tmp_path / "adapter")
    out = tmp_path / "out" / "any.safetensors"
    adapter_files.export(tmp_path / "adapter", out, format=format)
    lora.remove(trained)
    adapter_files.load(trained, out)
    assert_close(run_ours(trained), expected, relative=1e-5)


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "peft"])
def test_streams_of_the_adaln_layers_survive_an_export_with_a_note(trained, tmp_path, format, caplog):
    adapter_files.save(trained, tmp_path / "adapter", adaln_lora="reference")
    out = tmp_path / "out" / "adapter_model.safetensors"
    with caplog.at_level(logging.WARNING):
        adapter_files.export(tmp_path / "adapter", out, format=format)
    assert "reference tokens" in caplog.text
    assert adapter_files.load(trained, out).adaln_lora == "reference"


def test_export_of_another_tools_file_with_alpha_and_mixed_ranks(theirs, ours, tmp_path, base):
    model, _ = peft(theirs, rank_pattern={"to_q": 2, "patch_embed.proj": 1}, alpha=1)
    save_file(tensors_of(model), tmp_path / "in.safetensors")
    adapter_files.export(tmp_path / "in.safetensors", tmp_path / "out.safetensors", alpha=1)
    assert {v.shape[0] for k, v in load_file(tmp_path / "out.safetensors").items() if "lora_A" in k} == {RANK}
    fresh = copy.deepcopy(base)
    fresh.load_lora_adapter(tmp_path, weight_name="out.safetensors")
    assert_close(run_theirs(fresh), run_theirs(model), relative=1e-4)
    adapter_files.load(ours, tmp_path / "out.safetensors")
    assert_close(run_ours(ours), run_theirs(model), relative=1e-4)


# MARK: what is stated beside the numbers

PLACED = {"placement": "after", "offset": 1, "shift": 0.5}


def test_where_references_stood_is_kept(trained, tmp_path):
    adapter_files.save(trained, tmp_path / "adapter", reference=PLACED)
    assert adapter_files.load(trained, tmp_path / "adapter").reference == PLACED
    for format in adapter_files.FORMATS:
        out = tmp_path / format / "out.safetensors"
        adapter_files.export(tmp_path / "adapter", out, format=format)
        assert adapter_files.load(trained, out).reference == PLACED


def test_adapter_json_that_does_not_speak_of_references(trained, tmp_path):
    adapter_files.save(trained, tmp_path, reference=PLACED)
    raw = json.loads((tmp_path / "adapter.json").read_text())
    assert raw.pop("reference") == PLACED
    (tmp_path / "adapter.json").write_text(json.dumps(raw))
    assert adapter_files.load(trained, tmp_path).reference is None


@pytest.mark.parametrize("reference", [[1], {"shift": [1, 2]}, {"shift": float("nan")}, {"shift": None}, {1: 2}])
def test_senseless_reference(trained, tmp_path, reference):
    refused("expected texts and finite numbers", adapter_files.save, trained, tmp_path / "a", reference=reference)
    assert not (tmp_path / "a").exists()
    adapter_files.save(trained, tmp_path / "b")
    raw = json.loads((tmp_path / "b" / "adapter.json").read_text()) | {"reference": reference}
    (tmp_path / "b" / "adapter.json").write_text(json.dumps(raw))
    if reference != {1: 2}:  # JSON has no such keys
        refused("expected texts and finite numbers", adapter_files.load, trained, tmp_path / "b")


@pytest.mark.parametrize("variant, told", [("CogVideoX-5b", True), ("CogVideoX-2b", False), ("custom", False)])
def test_an_adapter_of_another_published_model_is_told(trained, tmp_path, caplog, monkeypatch, variant, told):
    published = dataclasses.replace(VARIANTS["CogVideoX-2b"], transformer=trained.config)
    monkeypatch.setitem(VARIANTS, "CogVideoX-2b", published)
    adapter_files.save(trained, tmp_path, variant=variant)
    with caplog.at_level(logging.WARNING, logger="sdv_jax"):
        adapter_files.load(trained, tmp_path)
    assert [record.getMessage() for record in caplog.records] == (
        [f"{tmp_path / WEIGHTS} was trained on CogVideoX-5b; this model is CogVideoX-2b"] if told else []
    )


def test_changes_that_are_all_zeros_are_left_out_and_told(written, ours, caplog):
    path, expected = written

    def zeros(tensors):
        tensors["transformer.norm_final.diff"] = np.zeros(32, np.float32)
        tensors["transformer.proj_out.diff_b"] = np.zeros(8, jnp.bfloat16)
        tensors["transformer.patch_embed.proj.lora_B.bias"] = np.zeros(32, np.float32)

    with caplog.at_level(logging.WARNING, logger="sdv_jax"):
        adapter_files.load(ours, changed(path, zeros))
    (record,) = caplog.records
    assert "left out 3 changes of weights and biases that are all zeros" in record.getMessage()
    assert_close(run_ours(ours), expected, relative=1e-4)
