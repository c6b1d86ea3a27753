"""What can be wrong with an adapter's file, and with what is asked of one."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files
from tests.checkpoints.adapter_tools import RANK, changed, drop, header, put, refused, rename, run_ours

TOQ = "transformer.transformer_blocks.1.attn1.to_q"

BAD_FILES = {
    "unknown keys": (
        put("transformer.norm.weight", np.ones(3, np.float32)),
        "these keys are not those of a LoRA: transformer.norm.weight",
    ),
    "text encoder": (
        put("text_encoder.encoder.block.0.q.lora_A.weight", np.ones((RANK, 3), np.float32)), "lora_A without lora_B",
    ),
    "no such block": (
        rename("blocks.1.attn1.to_q", "blocks.9.attn1.to_q"),
        "adapts modules that are not in this model: transformer_blocks.9.attn1.to_q (the model has 3 blocks)",
    ),
    "A without B": (drop(TOQ + ".lora_B.weight"), "transformer_blocks.1.attn1.to_q has lora_A without lora_B"),
    "B without A": (drop(TOQ + ".lora_A.weight"), "transformer_blocks.1.attn1.to_q has lora_B without lora_A"),
    "ranks": (put(TOQ + ".lora_B.weight", np.ones((32, 2), np.float32)), "lora_A is [4, 32] and lora_B [32, 2]"),
    "other width": (
        put(TOQ + ".lora_A.weight", np.ones((RANK, 48), np.float32)),
        "a model of another size: transformer_blocks.1.attn1.to_q.lora_A is [4, 48], expected [4, 32]",
    ),
    "matrix for a convolution": (
        put("transformer.patch_embed.proj.lora_A.weight", np.ones((RANK, 16), np.float32)),
        "patch_embed.proj.lora_A is [4, 16], expected [4, 4, 2, 2]",
    ),
    "NaN": (put(TOQ + ".lora_A.weight", np.full((RANK, 32), np.nan, np.float32)), "holds NaN or infinite values"),
    "infinity": (put(TOQ + ".lora_B.weight", np.full((32, RANK), np.inf, np.float32)), "holds NaN or infinite values"),
    "stray alpha": (put("transformer.proj_out.alpha", np.array(1, np.float32)), "proj_out.alpha is about no module"),
    "vector alpha": (put(TOQ + ".alpha", np.ones(3, np.float32)), "alpha stated for transformer_blocks.1.attn1.to_q"),
    "twice": (
        put(TOQ.replace("transformer.", "base_model.model.", 1) + ".lora_A.weight", np.ones((4, 32), np.float32)),
        "are the same weight",
    ),
    "alpha that is not positive": (put(TOQ + ".alpha", np.array(0, np.int64)), "makes no sense (it is 0"),
    "whole numbers for weights": (
        lambda t: t.update({key: t[key].astype(np.int8) for key in (TOQ + ".lora_A.weight", TOQ + ".lora_B.weight")}),
        "is stored as int8 and int8; expected floating point",
    ),
    "change of a norm": (put("transformer.norm_final.diff", np.ones(32, np.float32)), "a LoRA: transformer.norm_final"),
    "change of a bias": (put(TOQ + ".diff_b", np.ones(32, np.float32)), f"not those of a LoRA: {TOQ}.diff_b"),
    "LoRA bias": (put(TOQ + ".lora_B.bias", np.ones(32, np.float32)), f"not those of a LoRA: {TOQ}.lora_B.bias"),
    "DoRA without a config": (put(TOQ + ".dora_scale", np.zeros((32, 1), np.float32)), f"a LoRA: {TOQ}.dora_scale"),
    "LoKr": (put(TOQ + ".lokr_w1", np.zeros((2, 2), np.float32)), f"not those of a LoRA: {TOQ}.lokr_w1"),
    "many": (
        lambda t: t.update({f"transformer.x.{i}.hada_w1_a": np.zeros(1, np.float32) for i in range(11)}),
        "hada_w1_a; and 3 more",
    ),
    "underscores of no module": (
        rename("transformer.transformer_blocks.1.attn1.to_q.", "lora_unet_transformer_blocks_1_attn1_to_x."),
        "not in this model: transformer_blocks_1_attn1_to_x",
    ),
    "underscores of no block": (
        rename("transformer.transformer_blocks.1.attn1.to_q.", "lora_unet__transformer_blocks_7_attn1_to_q."),
        "not in this model: transformer_blocks_7_attn1_to_q (the model has 3 blocks)",
    ),
    "two spellings": (
        lambda t: t.update({
            "lora_unet_transformer_blocks_1_attn1_to_q.lora_down.weight": t[TOQ + ".lora_A.weight"],
            "lora_unet_transformer_blocks_1_attn1_to_q.lora_up.weight": t[TOQ + ".lora_B.weight"],
        }),
        "are the same layer; keep one adapter in it",
    ),
    "bad place of references": (
        lambda tensors: {"sdv_jax.reference": "[1]"}, "sdv_jax.reference: expected a JSON object, found list",
    ),
    "nothing": (lambda t: t.clear(), "holds no LoRA"),
    "DoRA": (header(**{"transformer.lora_alpha": 4, "transformer.use_dora": True}), "DoRA"),
    "bad metadata": (lambda tensors: {"lora_adapter_metadata": "{"}, "not readable as JSON"),
    "senseless alpha": (header(lora_alpha="much"), "makes no sense"),
    "senseless pattern": (header(lora_alpha=1, alpha_pattern={"(": 2}), "makes no sense"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_in_one_line_and_leaves_the_model_alone(written, ours, change, message):
    before = run_ours(ours)
    refused(message, adapter_files.load, ours, changed(written[0], change))
    np.testing.assert_array_equal(run_ours(ours), before)


def test_every_unmatched_module_is_listed(written, ours):
    file = changed(written[0], rename("to_out.0", "to_nowhere"))
    listed = "; ".join(f"transformer_blocks.{i}.attn1.to_nowhere" for i in range(3))
    refused(f"not in this model: {listed}", adapter_files.load, ours, file)


@pytest.mark.parametrize("keep", [0, 5, 100, -8])
def test_truncated_file(written, ours, keep):
    path, _ = written
    path.write_bytes(path.read_bytes()[:keep])
    refused("truncated", adapter_files.load, ours, path)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_alpha(written, ours, alpha):
    refused("expected a positive number", adapter_files.load, ours, written[0], alpha=alpha)


def test_alpha_that_contradicts_the_file(trained, tmp_path):
    folder = tmp_path / "adapter"
    adapter_files.save(trained, folder)
    refused("says alpha = 3, you say 8", adapter_files.load, trained, folder, alpha=8.0)
    adapter_files.load(trained, folder, alpha=3.0)
    adapter_files.export(folder, tmp_path / "out.safetensors")
    refused("states its own alpha", adapter_files.load, trained, tmp_path / "out.safetensors", alpha=3.0)


def test_paths_that_hold_no_adapter(ours, tmp_path):
    refused("there is no such adapter", adapter_files.load, ours, tmp_path / "absent")
    refused("no other .safetensors file", adapter_files.load, ours, tmp_path)
    (tmp_path / "adapter.bin").write_bytes(b"x")
    refused("read from .safetensors", adapter_files.load, ours, tmp_path / "adapter.bin")
    for name in ("a", "b"):
        save_file({"x": np.ones(1, np.float32)}, tmp_path / f"{name}.safetensors")
    refused("a.safetensors, b.safetensors; name the file", adapter_files.load, ours, tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw.update(family="wan"), "an adapter for the family 'wan'; this model is 'cogvideox'"),
    (lambda raw: raw.update(format_version=99), "format_version is not 1"),
    (lambda raw: raw.update(more=1), "expected rank, alpha, targets"),
    (lambda raw: raw.update(adaln_lora="some"), "expected rank, alpha, targets"),
    (lambda raw: raw.update(rank="four"), "expected rank, alpha, targets"),
    (lambda raw: raw.pop("alpha"), "expected rank, alpha, targets"),
])  # fmt: skip
def test_bad_adapter_json(trained, tmp_path, change, message):
    adapter_files.save(trained, tmp_path)
    raw = json.loads((tmp_path / "adapter.json").read_text())
    change(raw)
    (tmp_path / "adapter.json").write_text(json.dumps(raw))
    refused(message, adapter_files.load, trained, tmp_path)


def test_export_of_modules_that_no_model_has(written, tmp_path):
    bad = changed(written[0], rename("attn1.to_q", "attn1.to_x"))
    message = "no known model has: transformer_blocks.0.attn1.to_x; "
    refused(message, adapter_files.export, bad, tmp_path / "x.safetensors")


def test_export_of_modules_that_several_families_have(written, tmp_path):
    def only_last(tensors):
        tensors.clear()
        tensors["proj_out.lora_A.weight"] = np.ones((2, 32), np.float32)
        tensors["proj_out.lora_B.weight"] = np.ones((16, 2), np.float32)

    file = changed(written[0], only_last)
    out = tmp_path / "out.safetensors"
    refused("several families (cogvideox, wan)", adapter_files.export, file, out, format="comfyui")
    adapter_files.export(file, out)


def test_refused_exports(trained, written, tmp_path):
    path, _ = written
    refused("adapter format 'kohya' is unknown", adapter_files.export, path, tmp_path / "x.safetensors", format="kohya")
    refused("ends in .safetensors", adapter_files.export, path, tmp_path / "x.bin")
    refused("is already there", adapter_files.export, path, path)
    (tmp_path / "adapter_config.json").write_text("{}")
    out = tmp_path / "y.safetensors"
    refused("adapter_config.json is already there", adapter_files.export, path, out, format="peft")
    bad = changed(path, put(TOQ + ".lora_A.weight", np.full((RANK, 32), np.nan, np.float32)))
    refused("NaN", adapter_files.export, bad, tmp_path / "z.safetensors")
    assert not list(tmp_path.glob("z.*"))


def test_refused_saves(trained, tmp_path):
    layer = dict(lora.adapted(trained))["blocks.ff.up"]
    layer.lora.b.set_value(layer.lora.b[...].at[0, 0, 0].set(jnp.nan))
    refused("NaN", adapter_files.save, trained, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter.json").exists()
    lora.remove(trained)
    refused("no adapter to save", adapter_files.save, trained, tmp_path / "adapter")
