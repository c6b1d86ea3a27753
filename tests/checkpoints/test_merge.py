"""Adapters merged into a folder: against PEFT inside diffusers' model, `lora.merge` in memory, and our pipeline."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from sdv_jax.adapters import lora
from sdv_jax.checkpoints import adapter_files, model_folder
from sdv_jax.checkpoints.convert import convert
from sdv_jax.checkpoints.families import families, rules_of
from sdv_jax.checkpoints.merge import merge
from sdv_jax.checkpoints.safetensors_io import Output, open_folder, write_folder
from sdv_jax.models.wan import LORA_TARGETS
from sdv_jax.pipeline import load_pipeline
from tests import tiny_pipeline, tiny_wan
from tests.checkpoints.adapter_tools import PAPER, changed, peft, put, refused, tensors_of
from tests.parity.compare import assert_close, relative_error

RANK, ALPHA = 4, 3.0
TARGETS = {"cogvideox": PAPER, "wan": (*LORA_TARGETS, "patch_embedding", "proj_out", "time_proj")}
BEFORE = {"placement": "before", "offset": 1, "shift": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> a small diffusers folder of it."""
    place = tmp_path_factory.mktemp("models")
    return {
        "cogvideox": tiny_pipeline.save_pipeline(place / "cogvideox"),
        "wan": tiny_wan.save_pipeline(place / "wan", "a14b"),
    }


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """family -> (adapter's file, which states its alpha nowhere; diffusers' transformer with it)."""
    place = tmp_path_factory.mktemp("adapters")
    found = {}
    for family, folder in folders.items():
        model, _ = peft(transformer_in(folder), alpha=ALPHA, rank=RANK, targets=TARGETS[family])
        save_file(tensors_of(model), place / f"{family}.safetensors")
        found[family] = place / f"{family}.safetensors", model
    return found


def transformer_in(folder, **options):
    import diffusers

    kind = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder / "transformer", **options).eval()


def run_theirs(model) -> np.ndarray:
    rng, wide = np.random.default_rng(0), "CogVideoX" in type(model).__name__
    latents = torch.tensor(rng.standard_normal((2, 3, 4, 4, 6) if wide else (2, 4, 3, 4, 6), np.float32))
    text = torch.tensor(rng.standard_normal((2, 12 if wide else 9, 16), np.float32))
    with torch.no_grad():
        return model(
            hidden_states=latents, encoder_hidden_states=text, timestep=torch.tensor([3, 700])
        ).sample.numpy()


def read(folder, part="transformer") -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_folder(folder / part).items()}


def json_of(folder) -> dict:
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))}


# MARK: what the merged folder computes


@pytest.mark.parametrize("layout", ["diffusers", "converted"])
@pytest.mark.parametrize("family", TARGETS)
def test_diffusers_runs_the_merged_folder_as_peft_runs_the_adapter(folders, adapters, tmp_path, family, layout):
    model, (file, adapted) = folders[family], adapters[family]
    if layout == "converted":
        model = tmp_path / "ours"
        convert(folders[family], model, progress=False)
    merge(model, tmp_path / "merged", [file], alpha=ALPHA, progress=False)
    merged = run_theirs(transformer_in(tmp_path / "merged"))
    assert_close(merged, run_theirs(adapted), relative=1e-4)
    assert relative_error(merged, run_theirs(transformer_in(folders[family]))) > 0.1
    assert json_of(tmp_path / "merged") == json_of(folders[family])
    hit = {key.removeprefix("transformer.").split(".lora_")[0] + ".weight" for key in load_file(file)}
    for part in model_folder.read_config(folders[family])["config"]:
        before, after = read(folders[family], part), read(tmp_path / "merged", part)
        assert before.keys() == after.keys()
        same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
        assert before.keys() - same == (hit if part == "transformer" else set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_weights_are_those_of_a_merge_in_memory(folders, adapters, tmp_path, family, dtype):
    convert(folders[family], tmp_path / "ours", dtype=dtype, progress=False)
    merge(tmp_path / "ours", tmp_path / "merged", [adapters[family][0]], alpha=ALPHA, progress=False)
    expected = model_folder.load_component(tmp_path / "ours", "transformer", dtype)
    adapter_files.load(expected, adapters[family][0], alpha=ALPHA)
    lora.merge(expected)
    found = model_folder.load_component(tmp_path / "merged", "transformer", dtype)
    assert {str(value.dtype) for value in read(tmp_path / "merged").values()} >= {dtype}
    for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (found, expected)), strict=True):
        ours, theirs = (np.asarray(value[...]).astype(np.float32) for value in (ours, theirs))
        # Float32's last bit depends on the order of the sum, and may tip a rounding to bfloat16.
        np.testing.assert_allclose(ours, theirs, rtol=2**-7 if dtype == "bfloat16" else 0, atol=2e-6, err_msg=str(path))
        assert (ours == theirs).mean() > (0.999 if dtype == "bfloat16" else 0.3), path


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_dtypes_are_kept_and_rounded_once(folders, adapters, tmp_path, kind):
    model = shutil.copytree(folders["cogvideox"], tmp_path / "model")
    before = {name: value.astype(kind) for name, value in read(model).items()}
    save_file(before, model / "transformer" / "diffusion_pytorch_model.safetensors")
    merge(model, tmp_path / "merged", [adapters["cogvideox"][0]], alpha=ALPHA, progress=False)
    name, tensors = "transformer_blocks.1.attn1.to_q", load_file(adapters["cogvideox"][0])
    b, a = (tensors[f"transformer.{name}.lora_{half}.weight"].astype(np.float64) for half in "BA")
    after = read(tmp_path / "merged")
    assert {value.dtype for value in after.values()} == {np.dtype(kind)}
    exact = before[f"{name}.weight"].astype(np.float64) + ALPHA / RANK * b @ a
    np.testing.assert_allclose(after[f"{name}.weight"], exact, rtol=2**-11 if kind == np.float16 else 1e-6, atol=1e-6)


def test_several_adapters_are_summed(folders, adapters, tmp_path):
    file, model = adapters["cogvideox"][0], folders["cogvideox"]
    other, _ = peft(transformer_in(model), alpha=2, rank=2, targets=("to_q", "ff.net.2"), seed=5)
    save_file(tensors_of(other), tmp_path / "other.safetensors")
    merge(model, tmp_path / "both", [file, tmp_path / "other.safetensors"], progress=False)
    merge(model, tmp_path / "first", [file], progress=False)
    merge(tmp_path / "first", tmp_path / "second", [tmp_path / "other.safetensors"], progress=False)
    both, second, first = (read(tmp_path / name) for name in ("both", "second", "first"))
    for name in both:
        np.testing.assert_allclose(both[name], second[name], atol=2e-6, err_msg=name)
    assert sum((both[name] != first[name]).any() for name in both) == 2 * 2


def test_the_second_expert_has_its_own(folders, adapters, tmp_path):
    model, file = folders["wan"], adapters["wan"][0]
    merge(model, tmp_path / "out", adapters_2=[file], alpha=ALPHA, progress=False)
    assert all(np.array_equal(value, read(model)[name]) for name, value in read(tmp_path / "out").items())
    ours = load_pipeline(tmp_path / "out", progress=False)
    theirs = load_pipeline(model, adapter_2=file, adapter_alpha=ALPHA, progress=False)
    assert_close(predict(ours, expert=1), predict(theirs, expert=1))


def predict(pipe, expert=0):
    """One prediction with two references."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, 2, 4, 6, 4), (1, pipe.traits.text_length, 16), (1, 2, 4, 6, 4)]
    latents, text, reference = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return pipe.denoise(latents, text, jnp.array([300]), reference, expert=expert)


@pytest.mark.parametrize("reference", [None, BEFORE], ids=["usual place", "before the clip"])
@pytest.mark.parametrize("family", TARGETS)
def test_our_pipeline_needs_no_adapter_any_more(folders, adapters, tmp_path, family, reference):
    """What training left, with the place of references that it was trained with."""
    transformer = model_folder.load_component(folders[family], "transformer")
    adapter_files.load(transformer, adapters[family][0], alpha=ALPHA)
    adapter_files.save(transformer, tmp_path / "adapter", reference=reference)
    merge(folders[family], tmp_path / "merged", [tmp_path / "adapter"], progress=False)
    ours = predict(load_pipeline(tmp_path / "merged", progress=False))
    assert_close(ours, predict(load_pipeline(folders[family], adapter=tmp_path / "adapter", progress=False)))
    assert relative_error(ours, predict(load_pipeline(folders[family], progress=False))) > 0.01
    stated = model_folder.read_config(tmp_path / "merged")["defaults"].get("reference")
    assert stated == (reference if family == "wan" else None)
    if stated:  # it goes along
        convert(tmp_path / "merged", tmp_path / "ours", progress=False)
        assert_close(predict(load_pipeline(tmp_path / "ours", progress=False)), ours)


def test_adapters_of_two_places_are_refused(folders, adapters, tmp_path):
    transformer = model_folder.load_component(folders["wan"], "transformer")
    adapter_files.load(transformer, adapters["wan"][0])
    for name, place in (("a", BEFORE), ("b", {"placement": "after"})):
        adapter_files.save(transformer, tmp_path / name, reference=place)
    both = [tmp_path / "a", tmp_path / "b"]
    refused("the adapters differ in reference", merge, folders["wan"], tmp_path / "out", both, progress=False)


# MARK: what is refused


def test_an_adapter_of_the_reference_stream_is_refused(folders, adapters, tmp_path):
    transformer = model_folder.load_component(folders["cogvideox"], "transformer")
    _, rules = rules_of(transformer)
    for name, targets in (("adaln", ("to_q", "norm1.linear")), ("attention", ("to_q",))):
        lora.add(
            transformer, lora.LoraConfig(2, 2.0, targets), names=rules.to_torch_module_name, rngs=nnx.Rngs(0)
        )
        adapter_files.save(transformer, tmp_path / name, adaln_lora="reference")
        lora.remove(transformer)
    model, told = folders["cogvideox"], "adaLN layers act on reference tokens only (adaln_lora 'reference')"
    refused(told, merge, model, tmp_path / "out", [tmp_path / "adaln"], progress=False)
    merge(model, tmp_path / "out", [tmp_path / "attention"], progress=False)  # has no such layers: nothing is lost


def test_what_does_not_fit_leaves_nothing(folders, adapters, tmp_path):
    model, wan = folders["cogvideox"], folders["wan"]
    file = shutil.copy(adapters["cogvideox"][0], tmp_path / "in.safetensors")
    toq = "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight"
    hole = shutil.copy(changed(file, put(toq, np.full((RANK, 32), np.nan, np.float32))), tmp_path / "nan.safetensors")
    wide = shutil.copy(changed(file, put(toq, np.ones((RANK, 48), np.float32))), tmp_path / "wide.safetensors")
    huge = changed(file, put(toq, np.full((RANK, 32), 1e30, np.float32)))
    half = shutil.copytree(model, tmp_path / "half")
    narrow = {name: value.astype(np.float16) for name, value in read(model).items()}
    save_file(narrow, half / "transformer" / "diffusion_pytorch_model.safetensors")
    broken = shutil.copytree(model, tmp_path / "broken")
    save_file(
        read(model, "vae") | {"decoder.conv_in.conv.bias": np.full(8, np.nan, np.float32)},
        broken / "vae" / "diffusion_pytorch_model.safetensors",
    )
    for source, given, told in (
        (wan, {"adapters": [file]}, "adapts modules that are not in this model"),
        (model, {"adapters": [wide]}, "an adapter for a model of another size"),
        (model, {"adapters": [hole]}, "holds NaN or infinite values; the adapter is damaged"),
        (model, {"adapters_2": [file]}, "given for the second expert, and this model has one"),
        (half, {"adapters": [huge]}, "attn1.to_q.weight: the sum does not fit into float16"),
        (broken, {"adapters": [file]}, "conv_in.conv.bias holds NaN or infinite values; the checkpoint is damaged"),
        (tmp_path, {"adapters": [file]}, "neither model.json"),
    ):
        refused(told, merge, source, tmp_path / "out", progress=False, **given)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    refused("exists already", merge, model, half, [file], progress=False)


# MARK: memory

MEASURE = """
import sys
from sdv_jax.checkpoints import engine, merge, safetensors_io
for module in (engine, safetensors_io):
    module.BLOCK_BYTES = 4 * 2**20
merge._STEP_BYTES = 2**20
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
small, adapter, large, wide, out = sys.argv[1:]
merge.merge(small, out + "/small", [adapter], progress=False)
before = peak()  # with all that a merge imports
merge.merge(large, out + "/merged", [wide], progress=False)
print(peak() - before)
"""


@pytest.mark.parametrize("layout", ["diffusers", "converted"])
def test_memory_does_not_grow_with_the_model(folders, adapters, tmp_path, layout):
    """A transformer of 210 MB; no tensor of it has more than 5."""
    large = shutil.copytree(folders["cogvideox"], tmp_path / "large")
    sizes = {"num_layers": 16, "num_attention_heads": 16, "attention_head_dim": 32}
    config = json.loads((large / "transformer" / "config.json").read_text()) | sizes
    (large / "transformer" / "config.json").write_text(json.dumps(config))
    component = next(family for family in families() if family.name == "cogvideox").components["transformer"]
    rng, outputs = np.random.default_rng(0), []
    for leaf in component.leaves(component.parse(config, large)):
        values = rng.standard_normal(leaf.tensor_shape, np.float32)
        outputs += [Output(name, values.dtype, values.shape, [values]) for name in leaf.names]
    write_folder(large / "transformer", "diffusion_pytorch_model", outputs)
    total = sum(output.nbytes for output in outputs)
    if layout == "converted":
        convert(large, tmp_path / "ours", progress=False)
        large = tmp_path / "ours"
    wide = {
        f"transformer.transformer_blocks.{block}.{name}.lora_{half}.weight": np.ones(shape, np.float32)
        for block in range(16)
        for name, width in (("attn1.to_q", 512), ("ff.net.0.proj", 2048))
        for half, shape in (("A", (RANK, 512)), ("B", (width, RANK)))
    }
    save_file(wide, tmp_path / "wide.safetensors")
    command = [
        sys.executable, "-c", MEASURE, folders["cogvideox"], adapters["cogvideox"][0], large,
        tmp_path / "wide.safetensors", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(f"weights {total / 1e6:.0f} MB, growth {int(done.stdout) / 1e6:.0f} MB")
    assert total > 200e6 and int(done.stdout) < 100e6
