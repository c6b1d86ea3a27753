"""Loading components from both kinds of folder, what orbax itself makes of ours, and damage to it."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from sdv_jax.checkpoints.convert import convert, export
from sdv_jax.checkpoints.model_folder import check_sums, load_component, read_config
from sdv_jax.errors import UserError
from sdv_jax.sharding import dotted

PARTS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def converted(tiny_pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(tiny_pipeline_folder(True), folder, progress=False)
    return folder


@pytest.fixture
def model(converted, tmp_path):
    """A copy of the converted folder, free to be spoiled."""
    return shutil.copytree(converted, tmp_path / "model")


def arrays(module) -> dict[str, jax.Array]:
    return {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_kinds_of_folder_give_the_same_module(tiny_pipeline_folder, converted, part, dtype):
    ours, theirs = (arrays(load_component(folder, part, dtype)) for folder in (converted, tiny_pipeline_folder(True)))
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert array.dtype == ours[path].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(ours[path], np.float32), np.asarray(array, np.float32))


def test_values_land_where_they_belong(tiny_pipeline_folder, converted):
    import safetensors.numpy

    raw = safetensors.numpy.load_file(
        tiny_pipeline_folder(True) / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    found = arrays(load_component(converted, "transformer"))
    for layer in range(2):
        np.testing.assert_array_equal(
            found["blocks.attn1.to_q.kernel"][layer], raw[f"transformer_blocks.{layer}.attn1.to_q.weight"].T
        )
    np.testing.assert_array_equal(found["norm_final.scale"], raw["norm_final.weight"])


def test_orbax_restores_the_arrays_without_us(converted):
    expected = arrays(load_component(converted, "transformer"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        plain = checkpointer.restore(converted / "transformer")
    flat = {".".join(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(plain)}
    assert flat.keys() == expected.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, expected[path])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=device), plain)
    with ocp.StandardCheckpointer() as checkpointer:
        placed = checkpointer.restore(converted / "transformer", target)
    np.testing.assert_array_equal(
        placed["blocks"]["ff"]["up"]["kernel"], expected["blocks.ff.up.kernel"].astype(jnp.bfloat16)
    )


MESH = """
import sys, jax, numpy as np
from flax import nnx
from sdv_jax.checkpoints.model_folder import load_component
from sdv_jax.sharding import dotted
mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "sp"), axis_types=(jax.sharding.AxisType.Explicit,) * 3)
for part in ("transformer", "vae", "text_encoder"):
    for folder in sys.argv[1:]:
        spread = nnx.to_flat_state(nnx.state(load_component(folder, part, "float32", mesh)))
        whole = dict(nnx.to_flat_state(nnx.state(load_component(folder, part))))
        for path, leaf in spread:
            np.testing.assert_array_equal(np.asarray(leaf[...]), np.asarray(whole[path][...]))
            if dotted(path) == "blocks.attn1.to_q.kernel":
                assert [s.data.shape for s in leaf[...].addressable_shards] == [(2, 8, 32)] * 8, leaf[...].sharding
"""


def test_weights_spread_over_a_mesh(tiny_pipeline_folder, converted):
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8)\n" + MESH
    subprocess.run([sys.executable, "-c", code, str(converted), str(tiny_pipeline_folder(True))], check=True)


def test_read_config_agrees_for_both_kinds(tiny_pipeline_folder, converted):
    ours, theirs = read_config(converted), read_config(tiny_pipeline_folder(True))
    assert all(ours[key] == value for key, value in theirs.items())
    assert (ours["family"], ours["variant"], ours["scheduler"]["_class_name"]) == (
        "cogvideox",
        "custom",
        "CogVideoXDDIMScheduler",
    )


# ---------------------------------------------------------------- damage


def refused(action, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        action()
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line


ARRAY = "blocks.ff.up.kernel"


def chunk(model):
    return next(file for file in (model / "transformer" / ARRAY / "c").rglob("*") if file.is_file())


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def edit(model, **changes):
    file = model / "model.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


DAMAGE = {
    "flipped bit": (lambda m: flip(chunk(m)), f"array {ARRAY} is incomplete or damaged"),
    "missing block": (lambda m: chunk(m).unlink(), f"array {ARRAY} is incomplete or damaged"),
    "short block": (
        lambda m: chunk(m).write_bytes(chunk(m).read_bytes()[:50]),
        f"array {ARRAY} is incomplete or damaged",
    ),
    "missing array": (lambda m: shutil.rmtree(m / "transformer" / ARRAY), f"missing {ARRAY}"),
    "broken array description": (
        lambda m: (m / "transformer" / ARRAY / "zarr.json").write_text("{"),
        f"array {ARRAY} is incomplete or damaged",
    ),
    "surplus array": (
        lambda m: shutil.copytree(m / "transformer" / ARRAY, m / "transformer" / "more"),
        "unexpected more",
    ),
    "array of another shape": (
        lambda m: shutil.copytree(
            m / "transformer" / "proj_out.bias", m / "transformer" / "norm_final.bias", dirs_exist_ok=True
        ),
        "norm_final.bias has shape (16,), expected (32,)",
    ),
    "missing component": (lambda m: shutil.rmtree(m / "transformer"), "not a complete set of arrays"),
    "broken model.json": (lambda m: (m / "model.json").write_text("[]"), "expected a JSON object"),
    "other version": (lambda m: edit(m, format_version=99), "format_version is 99, expected 1"),
    "other family": (lambda m: edit(m, family="hunyuan"), "unknown family 'hunyuan'"),
    "incomplete model.json": (lambda m: edit(m, checksums=...), "no checksums"),
    "incomplete config": (lambda m: edit(m, config={}), "no config of transformer, vae, text_encoder"),
    "config is a list": (lambda m: edit(m, config=[]), "model.json: config is [], expected an object"),
    "config of a component is a text": (
        lambda m: edit(m, config=dict.fromkeys(PARTS, "x")),
        "model.json: config.transformer is 'x', expected an object",
    ),
    "no tied": (lambda m: edit(m, tied=...), "model.json: no tied;"),
    "no tensor_dtypes": (lambda m: edit(m, tensor_dtypes=...), "model.json: no tensor_dtypes;"),
    "tied of no component": (lambda m: edit(m, tied={}), "model.json: no tied of transformer, vae, text_encoder"),
    "tied to a number": (
        lambda m: edit(m, tied=dict.fromkeys(PARTS, {"shared.weight": 3})),
        "model.json: tied.transformer.shared.weight is 3, expected a list of names",
    ),
    "unknown dtype of a tensor": (
        lambda m: edit(m, tensor_dtypes=dict.fromkeys(PARTS, {"proj_out.bias": "F7"})),
        "model.json: tensor_dtypes.transformer.proj_out.bias is 'F7', expected one of",
    ),
    "checksums of an unknown component": (
        lambda m: edit(m, checksums=dict.fromkeys((*PARTS, "lung"), {})),
        "model.json: checksums of unknown lung",
    ),
    "scheduler is a list": (lambda m: edit(m, scheduler=[]), "model.json: scheduler is [], expected an object"),
    "unknown scheduler": (lambda m: edit(m, scheduler={"_class_name": "PNDM"}), "model.json: scheduler: unknown class"),
    "model_index is null": (lambda m: edit(m, model_index=None), "model.json: model_index is None, expected an object"),
    "family is a list": (lambda m: edit(m, family=["x"]), "model.json: family is ['x'], expected a text"),
    "tokenizer is a text": (lambda m: edit(m, tokenizer="x"), "model.json: tokenizer is 'x', expected an object"),
    "checksums is null": (lambda m: edit(m, checksums=None), "model.json: checksums is None, expected an object"),
    "deep model.json": (lambda m: (m / "model.json").write_text("[" * 100_000), "brackets nest too deep"),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), "tokenizer: no tokenizer_config.json"),
    "no vocabulary": (lambda m: (m / "tokenizer" / "tokenizer.json").unlink(), "tokenizer: no vocabulary"),
    "nothing": (lambda m: (m / "model.json").unlink(), "neither model.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(model, case):
    change, message = DAMAGE[case]
    change(model)
    refused(lambda: load_component(model, "transformer"), str(model), message)
    refused(lambda: export(model, model.with_name("out"), progress=False), str(model))
    assert not model.with_name("out").exists()


def test_no_such_folder_or_component(model, tmp_path):
    refused(lambda: load_component(tmp_path / "nowhere", "vae"), "no such folder")
    refused(lambda: load_component(model, "lung"), "no component 'lung'", "text_encoder")


def test_checksums_find_consistent_changes(model):
    """What the blocks' own sums cannot see: a block and its sum replaced together."""
    check_sums(model)
    for name in ("blocks.attn1.to_k.kernel", "blocks.attn1.to_q.kernel"):
        shutil.copytree(
            model / "transformer" / "blocks.attn1.to_v.kernel", model / "transformer" / name, dirs_exist_ok=True
        )
    (model / "tokenizer" / "tokenizer_config.json").write_text("{}")
    refused(
        lambda: check_sums(model),
        "transformer/blocks.attn1.to_k.kernel; transformer/blocks.attn1.to_q.kernel; tokenizer/tokenizer_config.json",
    )
    refused(lambda: load_component(model, "transformer", check=True), "checksums differ")
    load_component(model, "vae", check=True)
