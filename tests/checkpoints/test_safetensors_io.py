"""Our reader and writer against the safetensors library, and what they refuse."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sdv_jax.checkpoints.safetensors_io import (
    BLOCK_BYTES,
    Output,
    open_folder,
    read_header,
    rows_of,
    rows_per_block,
    variant_of,
    write_folder,
)
from sdv_jax.errors import UserError

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def values(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"t{i}": rng.standard_normal(shape).astype(dtype)
        for i, (shape, dtype) in enumerate(
            (shape, dtype) for shape in [(), (3,), (4, 5), (2, 1, 3, 2)] for dtype in DTYPES
        )
    }


def outputs(tensors) -> list[Output]:
    return [Output(name, array.dtype, array.shape, rows_of(array, 16)) for name, array in tensors.items()]


def bits(array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def test_reads_what_the_library_writes(tmp_path):
    safetensors.numpy.save_file(values(), tmp_path / "model.safetensors")
    found = open_folder(tmp_path)
    assert found.keys() == values().keys()
    for name, array in values().items():
        assert (
            found[name].dtype == array.dtype
            and found[name].shape == array.shape
            and bits(found[name].read()) == bits(array)
        )


@pytest.mark.parametrize("shard_bytes", [10**9, 200, 1])
def test_the_library_reads_what_we_write(tmp_path, shard_bytes):
    write_folder(tmp_path, "model", outputs(values()), shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}
    assert {name: (a.dtype, a.shape, bits(a)) for name, a in found.items()} == {
        n: (a.dtype, a.shape, bits(a)) for n, a in values().items()
    }
    if shard_bytes < 10**9:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in values().values())
        assert {tmp_path / shard for shard in index["weight_map"].values()} == set(files)
        assert open_folder(tmp_path).keys() == values().keys()
    assert not list(tmp_path.glob("*.partial"))


def test_blocks_are_contiguous_pieces_in_order():
    array = np.arange(7 * 6, dtype=np.float32).reshape(6, 7).T
    blocks = list(rows_of(array, 60))
    assert all(block.flags.c_contiguous and block.nbytes <= 60 for block in blocks) and len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks), array)
    assert rows_per_block((1000, 1000), 4, BLOCK_BYTES) == 1000


@pytest.mark.parametrize(
    "name, variant",
    [
        ("model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("model.safetensors.index.json", None),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
    ],
)
def test_variant_of(name, variant):
    assert variant_of(name) == variant


@pytest.fixture
def file(tmp_path):
    safetensors.numpy.save_file(values(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def refused(file, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        open_folder(file.parent)
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line


def test_rows_are_read_alone(tmp_path, monkeypatch):
    values = np.arange(60, dtype=np.float32).reshape(10, 6)
    safetensors.numpy.save_file({"first": np.zeros(3, np.float32), "x": values}, tmp_path / "model.safetensors")
    tensor = open_folder(tmp_path)["x"]
    np.testing.assert_array_equal(tensor.read(slice(3, 7)), values[3:7])
    np.testing.assert_array_equal(tensor.read(slice(8, 99)), values[8:])
    monkeypatch.setattr("sdv_jax.checkpoints.safetensors_io.BLOCK_BYTES", 100)  # four rows
    tensor.expect()
    pieces = [piece.copy() for piece in tensor.blocks()]
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(pieces), values)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    refused(file, str(file), "truncated")


def test_trailing_bytes(file):
    file.write_bytes(file.read_bytes() + b"x")
    refused(file, "truncated or corrupt")


def test_header_that_is_no_json(file):
    raw = bytearray(file.read_bytes())
    raw[20:24] = b"\xff\xff\xff\xff"
    file.write_bytes(raw)
    refused(file, "header cannot be read")


def rewrite(file, change) -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda h: h["t3"].update(dtype="I64"), "stored as I64"),
        (lambda h: h["t4"].update(shape=[5]), "shape (5,) needs"),
        (lambda h: h["t4"].update(shape=[-3]), "t4"),
        (lambda h: h.pop("t5"), "corrupt"),
        (lambda h: h["t5"].update(data_offsets=h["t4"]["data_offsets"]), "corrupt"),
        (lambda h: h["t5"].pop("shape"), "header cannot be read (KeyError)"),
    ],
)
def test_header_that_does_not_add_up(file, change, part):
    rewrite(file, change)
    refused(file, part)


def test_file_that_shrinks_after_opening(file):
    tensor = max(read_header(file).values(), key=lambda t: t.start)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        tensor.read()


def test_which_weights(tmp_path, file):
    raw = file.read_bytes()
    (tmp_path / "model.fp16.safetensors").write_bytes(raw)
    assert {t.file.name for t in open_folder(tmp_path).values()} == {"model.safetensors"}
    file.unlink()
    assert {t.file.name for t in open_folder(tmp_path).values()} == {"model.fp16.safetensors"}
    (tmp_path / "model.bf16.safetensors").write_bytes(raw)
    refused(file, "several sets of weights", "model.bf16.safetensors", "model.fp16.safetensors")


def test_folder_without_usable_weights(tmp_path):
    probe = tmp_path / "model.safetensors"
    refused(probe, "no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(probe, "only pickled weights")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    refused(probe, "shards without their index")


@pytest.fixture
def sharded(tmp_path):
    write_folder(tmp_path, "model", outputs(values()), shard_bytes=200)
    return tmp_path / "model.safetensors.index.json"


def test_index_that_names_a_missing_file(sharded):
    next(sharded.parent.glob("model-00001-*")).unlink()
    refused(sharded, "model-00001-of-", "download is incomplete")


def test_index_and_files_that_disagree(sharded):
    index = json.loads(sharded.read_text())
    shard = index["weight_map"].pop("t0")
    index["weight_map"]["ghost"] = shard
    sharded.write_text(json.dumps(index))
    refused(sharded, "t0 (in ", "ghost (listed in ")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_unreadable_index(sharded, text):
    sharded.write_text(text)
    refused(sharded, "not a readable index")


def test_index_that_points_outside(sharded):
    sharded.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    refused(sharded, "not in the folder")
