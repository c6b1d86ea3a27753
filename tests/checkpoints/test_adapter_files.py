"""Adapter files against the tools that write and read them, PEFT and diffusers, and what can be wrong with one."""

import copy
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files
from sdv_jax.checkpoints.adapter_files import WEIGHTS
from sdv_jax.models.cogvideox import rules as cogvideox
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from tests.parity.compare import assert_close, relative_error

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 3, "sample_width": 6, "sample_height": 4, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
PAPER = ("to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2")
RANK = 4
NAMES = cogvideox.transformer(2).to_torch_module_name
TOQ = "transformer.transformer_blocks.1.attn1.to_q"


# MARK: a model, there and here


@pytest.fixture(scope="module")
def base() -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture
def theirs(base):
    return copy.deepcopy(base)


@pytest.fixture
def ours(base) -> Transformer:
    """The same weights here, copied by the rules."""
    weights = {name: value.numpy() for name, value in base.state_dict().items()}
    config, rules = TransformerConfig(**SIZES), cogvideox.transformer(2)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        rule = rules.of_path(".".join(path))
        layers = range(config.num_layers) if rule.stacked else [None]
        names = [rule.torch_name(".".join(path), layer) for layer in layers]
        values = [rule.transform.to_ours(weights[name]) for name in names]
        variable.set_value(jnp.asarray(np.stack(values) if rule.stacked else values[0]))
    return model


def peft(model, *, alpha=RANK, rank=RANK, targets=PAPER, seed=1, **options):
    """PEFT's own adapter inside diffusers' model, with weights that do something."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)
    inject_adapter_in_model(config, model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval(), config


def tensors_of(model, prefix="transformer.") -> dict[str, np.ndarray]:
    return {prefix + name: value.numpy() for name, value in get_peft_model_state_dict(model).items()}


def run_theirs(model) -> np.ndarray:
    latents, text, times = _inputs()
    with torch.no_grad():
        out = model(torch.tensor(latents).permute(0, 1, 4, 2, 3), torch.tensor(text), torch.tensor(times)).sample
    return out.permute(0, 1, 3, 4, 2).numpy()


_forward = jax.jit(lambda model, *inputs: model(*inputs))


def run_ours(model) -> np.ndarray:
    return np.asarray(_forward(model, *map(jnp.asarray, _inputs())))


def _inputs():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 4, 6, 4)).astype(np.float32)
    return latents, rng.standard_normal((2, 5, 12)).astype(np.float32), np.array([3, 700])


@pytest.fixture
def written(theirs, tmp_path):
    """The paper's adapter in a file that states no alpha, and what the adapted model answers at alpha = rank."""
    model, _ = peft(theirs)
    path = tmp_path / "pytorch_lora_weights_transformer.safetensors"
    save_file(tensors_of(model), path)
    return path, run_theirs(model)


def changed(path, change):
    """The file again, under another name, after `change(tensors)`, which may return header entries."""
    tensors = load_file(path)
    metadata = change(tensors)
    new = path.with_name("changed.safetensors")
    save_file(tensors, new, metadata=metadata)
    return new


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


DIALECTS = {
    "transformer.": lambda key: key,
    "bare": lambda key: key.removeprefix("transformer."),
    "PEFT": lambda key: key.replace("transformer.", "base_model.model.", 1),
    "PEFT inside transformer": lambda key: key.replace("transformer.", "transformer.base_model.model.", 1),
    "adapter name": lambda key: key.replace(".weight", ".default.weight"),
    "diffusion_model.": lambda key: key.replace("transformer.", "diffusion_model.", 1),
    "lora_down, lora_up": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "lora.down, lora.up": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
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


def test_alpha_tensors(written, ours):
    path, _ = written

    def alphas(tensors):
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            tensors[key.removesuffix("lora_A.weight") + "alpha"] = np.array(RANK / 2, np.float32)

    adapter_files.load(ours, path, alpha=RANK / 2)
    expected = run_ours(ours)
    adapter_files.load(ours, changed(path, alphas))
    np.testing.assert_array_equal(run_ours(ours), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_file(written, ours, dtype):
    path, expected = written

    def narrow(tensors):
        for key in tensors:
            tensors[key] = tensors[key].astype(dtype)

    adapter_files.load(ours, changed(path, narrow))
    assert next(iter(lora.adapted(ours)))[1].lora.a.dtype == jnp.float32
    assert 0 < relative_error(run_ours(ours), expected) < 0.05


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


@pytest.fixture
def trained(ours):
    """Our model with an adapter at alpha = 3/4 rank, A and B at random."""
    config = lora.LoraConfig(rank=RANK, alpha=0.75 * RANK, targets=PAPER, dropout=0.2)
    lora.add(ours, config, names=NAMES, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for _, layer in lora.adapted(ours):
        layer.lora.b.set_value(jnp.asarray(rng.normal(0, 0.3, layer.lora.b.shape), jnp.float32))
    return ours


def test_save_and_load_is_the_same_adapter(trained, tmp_path):
    expected = run_ours(trained)
    before = {path: layer.lora for path, layer in lora.adapted(trained)}
    adapter_files.save(trained, tmp_path / "adapter", targets=PAPER, adaln_lora="reference", variant="tiny", base="abc")
    lora.remove(trained)
    info = adapter_files.load(trained, tmp_path / "adapter")
    assert info == adapter_files.AdapterInfo(RANK, 3.0, PAPER, "reference", "cogvideox", "tiny", "abc")
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


# MARK: what is refused


def refused(message, act, *args, **options):
    with pytest.raises(UserError) as caught:
        act(*args, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def _set(key, value):
    def change(tensors):
        tensors[key] = value

    return change


def _drop(key):
    def change(tensors):
        del tensors[key]

    return change


def _rename(old, new):
    def change(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def _header(**config):
    """diffusers' header entry with these keys of PEFT's config."""
    return lambda tensors: {"lora_adapter_metadata": json.dumps(config)}


BAD_FILES = {
    "unknown keys": (
        _set("transformer.norm.weight", np.ones(3, np.float32)),
        "these keys are not those of a LoRA: transformer.norm.weight",
    ),
    "text encoder": (
        _set("text_encoder.encoder.block.0.q.lora_A.weight", np.ones((RANK, 3), np.float32)), "lora_A without lora_B",
    ),
    "no such block": (
        _rename("blocks.1.attn1.to_q", "blocks.9.attn1.to_q"),
        "adapts modules that are not in this model: transformer_blocks.9.attn1.to_q (the model has 3 blocks)",
    ),
    "A without B": (_drop(TOQ + ".lora_B.weight"), "transformer_blocks.1.attn1.to_q has lora_A without lora_B"),
    "B without A": (_drop(TOQ + ".lora_A.weight"), "transformer_blocks.1.attn1.to_q has lora_B without lora_A"),
    "ranks": (_set(TOQ + ".lora_B.weight", np.ones((32, 2), np.float32)), "lora_A is [4, 32] and lora_B [32, 2]"),
    "other width": (
        _set(TOQ + ".lora_A.weight", np.ones((RANK, 48), np.float32)),
        "a model of another size: transformer_blocks.1.attn1.to_q.lora_A is [4, 48], expected [4, 32]",
    ),
    "matrix for a convolution": (
        _set("transformer.patch_embed.proj.lora_A.weight", np.ones((RANK, 16), np.float32)),
        "patch_embed.proj.lora_A is [4, 16], expected [4, 4, 2, 2]",
    ),
    "NaN": (_set(TOQ + ".lora_A.weight", np.full((RANK, 32), np.nan, np.float32)), "holds NaN or infinite values"),
    "infinity": (_set(TOQ + ".lora_B.weight", np.full((32, RANK), np.inf, np.float32)), "holds NaN or infinite values"),
    "stray alpha": (_set("transformer.proj_out.alpha", np.array(1, np.float32)), "proj_out.alpha is about no module"),
    "vector alpha": (_set(TOQ + ".alpha", np.ones(3, np.float32)), "alpha stated for transformer_blocks.1.attn1.to_q"),
    "twice": (
        _set(TOQ.replace("transformer.", "base_model.model.", 1) + ".lora_A.weight", np.ones((4, 32), np.float32)),
        "are the same weight",
    ),
    "nothing": (lambda t: t.clear(), "holds no LoRA"),
    "DoRA": (_header(**{"transformer.lora_alpha": 4, "transformer.use_dora": True}), "DoRA"),
    "bad metadata": (lambda tensors: {"lora_adapter_metadata": "{"}, "not readable as JSON"),
    "senseless alpha": (_header(lora_alpha="much"), "makes no sense"),
    "senseless pattern": (_header(lora_alpha=1, alpha_pattern={"(": 2}), "makes no sense"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused_in_one_line_and_leaves_the_model_alone(written, ours, change, message):
    before = run_ours(ours)
    refused(message, adapter_files.load, ours, changed(written[0], change))
    np.testing.assert_array_equal(run_ours(ours), before)


def test_every_unmatched_module_is_listed(written, ours):
    file = changed(written[0], _rename("to_out.0", "to_nowhere"))
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


def test_refused_exports(trained, written, tmp_path):
    path, _ = written
    refused("adapter format 'kohya' is unknown", adapter_files.export, path, tmp_path / "x.safetensors", format="kohya")
    refused("ends in .safetensors", adapter_files.export, path, tmp_path / "x.bin")
    refused("is already there", adapter_files.export, path, path)
    (tmp_path / "adapter_config.json").write_text("{}")
    out = tmp_path / "y.safetensors"
    refused("adapter_config.json is already there", adapter_files.export, path, out, format="peft")
    bad = changed(path, _set(TOQ + ".lora_A.weight", np.full((RANK, 32), np.nan, np.float32)))
    refused("NaN", adapter_files.export, bad, tmp_path / "z.safetensors")
    assert not list(tmp_path.glob("z.*"))


def test_refused_saves(trained, tmp_path):
    layer = dict(lora.adapted(trained))["blocks.ff.up"]
    layer.lora.b.set_value(layer.lora.b[...].at[0, 0, 0].set(jnp.nan))
    refused("NaN", adapter_files.save, trained, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter.json").exists()
    lora.remove(trained)
    refused("no adapter to save", adapter_files.save, trained, tmp_path / "adapter")
