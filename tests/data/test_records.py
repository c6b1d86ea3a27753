import dataclasses
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from configs.prepare import get_config
from sdv_jax.data import records
from sdv_jax.errors import UserError
from tests.train import tiny

READ_WITH_TFDS = """
import sys
import numpy as np
import tensorflow_datasets as tfds
source = tfds.data_source(sys.argv[1], data_dir=sys.argv[2])["train"]
rows = [source[i] for i in range(len(source))]
assert "tensorflow" not in sys.modules
np.savez(sys.argv[3], **{n: np.stack([r[n] for r in rows]) for n in ("mean", "reference_logvar")},
         caption=[r["caption"].decode() for r in rows], text0=rows[0]["text"])
"""

WRITE_AND_READ = """
import sys
from sdv_jax.data import records
from tests.train import tiny
dataset, before = tiny.dataset(5, frames=2, views=3), set(sys.modules)
records.save(sys.argv[1], dataset)
(bucket,) = records.load(sys.argv[1]).buckets
bucket[0], bucket.describe(1)
late = [name for name in set(sys.modules) - before if name.startswith(("etils", "tensorflow", "array_record"))]
assert not late, late
"""


def as_dataset(folder, name="set", **options):
    dataset = tiny.dataset(5, frames=2, views=3, **options)
    records.save(folder / name, dataset)
    return dataset, folder / name


def with_zero_rows(dataset, used):
    text = np.array(dataset.text)
    for row, n in enumerate(used):
        text[row, n:] = 0
    return dataclasses.replace(dataset, text=text)


@pytest.mark.parametrize("token_ids", [False, True])
def test_records_come_back_as_they_were(tmp_path, token_ids):
    dataset, folder = as_dataset(tmp_path, token_ids=token_ids)
    loaded = records.load(folder)
    (bucket,) = loaded.buckets
    assert len(loaded) == len(bucket) == len(dataset) and loaded.scale == dataset.scale
    assert bucket.has_token_ids == token_ids
    np.testing.assert_array_equal(loaded.empty_text, dataset.empty_text)
    for i, caption in enumerate(dataset.captions):
        found = bucket[i]
        assert set(found) == set(records.ARRAYS)
        for name in records.ARRAYS:
            np.testing.assert_array_equal(found[name], getattr(dataset, name)[i])
            assert found[name].dtype == getattr(dataset, name).dtype and found[name].shape == bucket.shapes[name]
        assert bucket.describe(i) == {"key": f"{i:06d}", "caption": caption, "provenance": {}}


@pytest.mark.parametrize("index", [-1, 5])
def test_there_is_no_record_outside(tmp_path, index):
    _, folder = as_dataset(tmp_path)
    with pytest.raises(KeyError):
        records.load(folder).buckets[0][index]


@pytest.mark.parametrize("dtype", [np.float32, get_config().output.dtype])
def test_tensorflow_datasets_reads_it_without_tensorflow(tmp_path, dtype):
    dataset = with_zero_rows(tiny.dataset(5, frames=2, views=3), [1, 0, 2, 1, 2])
    names = (*records.ARRAYS, "empty_text")
    dataset = dataclasses.replace(dataset, **{name: getattr(dataset, name).astype(dtype) for name in names})
    records.save(tmp_path / "my_set", dataset)
    name = f"my_set/{records.load(tmp_path / 'my_set').buckets[0].name}"
    command = [sys.executable, "-c", READ_WITH_TFDS, name, str(tmp_path), str(tmp_path / "read.npz")]
    subprocess.run(command, check=True, capture_output=True)
    read = np.load(tmp_path / "read.npz")
    np.testing.assert_array_equal(read["mean"], dataset.mean)
    np.testing.assert_array_equal(read["reference_logvar"], dataset.reference_logvar)
    np.testing.assert_array_equal(read["text0"], dataset.text[0, :1])
    assert tuple(read["caption"]) == dataset.captions


def test_nothing_that_replaces_pythons_import_is_imported_while_threads_may_import(tmp_path):
    command = [sys.executable, "-c", WRITE_AND_READ, str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_zero_rows_of_text_are_not_stored_and_come_back(tmp_path):
    whole = tiny.dataset(5, frames=1, views=1)
    length = whole.text.shape[1]
    cut = with_zero_rows(whole, [0, 1, length, 1, 1])
    cut.text[3, 0] = 0
    cut.text[4, 1] = -0.0  # a zero with its sign's bit set is not padding
    for name, dataset in (("whole", whole), ("cut", cut)):
        records.save(tmp_path / name, dataset)
    bucket = records.load(tmp_path / "cut").buckets[0]
    found = np.stack([bucket[i]["text"] for i in range(5)])
    np.testing.assert_array_equal(found.view(np.uint32), cut.text.view(np.uint32))
    assert records.load(tmp_path / "whole").buckets[0].shards[0].bytes >= bucket.shards[0].bytes


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_kept(tmp_path, dtype):
    dataset = tiny.dataset(3, frames=1, views=2)
    changed = {name: getattr(dataset, name).astype(dtype) for name in (*records.ARRAYS, "empty_text")}
    records.save(tmp_path / "half", dataclasses.replace(dataset, **changed))
    loaded = records.load(tmp_path / "half")
    assert loaded.empty_text.dtype == loaded.buckets[0][0]["mean"].dtype == dtype
    np.testing.assert_array_equal(loaded.buckets[0][2]["text"], changed["text"][2])
    np.testing.assert_array_equal(loaded.empty_text, changed["empty_text"])


def test_a_bucket_travels_to_other_processes_and_threads(tmp_path):
    dataset, folder = as_dataset(tmp_path)
    bucket = records.load(folder).buckets[0]
    for copy in (pickle.loads(pickle.dumps(bucket)), bucket):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i, copy=copy: copy[i % 5]["mean"], range(200)))
        for i, mean in enumerate(found):
            np.testing.assert_array_equal(mean, dataset.mean[i % 5])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(bucket))[1]["mean"], dataset.mean[1])


def test_units_without_a_record_have_no_file(tmp_path):
    dataset = tiny.dataset(5, frames=2, views=3)
    records.save(tmp_path / "one", dataset)
    features = records.load(tmp_path / "one").buckets[0].features
    folder, shards = tmp_path / "many", []
    for unit, rows in {1: [0, 1], 4: [2, 3, 4]}.items():
        with records.ShardWriter(folder, "9x16x24", features, unit=unit, units=7) as writer:
            for row in rows:
                arrays = {name: getattr(dataset, name)[row] for name in records.ARRAYS}
                writer.write(arrays, key=f"k{row}", caption="a red ball", provenance={"row": row, "of": "ä"})
        shards.append(writer.shard())
    records.write_empty_text(folder, dataset.empty_text)
    made = records.finish(
        folder, {"9x16x24": ((9, 16, 24), features, shards[::-1])}, scale=dataset.scale, units=7, about={"a": 1}
    )
    loaded = records.load(folder)
    assert loaded.about == {"a": 1} and loaded.fingerprint == made.fingerprint
    (bucket,) = loaded.buckets
    assert bucket.size == (9, 16, 24) and len(bucket) == 5
    assert [bucket.describe(i)["provenance"]["row"] for i in range(5)] == list(range(5))
    command = [sys.executable, "-c", READ_WITH_TFDS, "many/9x16x24", str(tmp_path), str(tmp_path / "read.npz")]
    subprocess.run(command, check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "read.npz")["mean"], dataset.mean)
    (tmp_path / "many").rename(tmp_path / "other")
    command[3] = "other/9x16x24"
    subprocess.run(command, check=True, capture_output=True)
    assert len(records.load(tmp_path / "other")) == 5


def test_the_fingerprint_is_of_the_contents(tmp_path):
    dataset = tiny.dataset(5, frames=2, views=3)
    for name in ("one", "same"):
        records.save(tmp_path / name, dataset)
    changed = np.array(dataset.logvar)
    changed[4, 0, 0, 0, 0] += 1e-6
    records.save(tmp_path / "other", dataclasses.replace(dataset, logvar=changed))
    one, same, other = (records.load(tmp_path / name).fingerprint for name in ("one", "same", "other"))
    assert one == same != other


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    dataset, folder = as_dataset(tmp_path)
    features = records.load(folder).buckets[0].features
    with pytest.raises(RuntimeError, match="stop"), records.ShardWriter(
        tmp_path, "b", features, unit=0, units=1
    ) as writer:
        writer.write({n: getattr(dataset, n)[0] for n in records.ARRAYS}, key="", caption="", provenance={})
        raise RuntimeError("stop")
    assert not list((tmp_path / "b" / records.VERSION).iterdir())


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [(1e5, "float16", "float16 cannot hold"), (np.nan, "float16", "NaN or infinite"), (np.inf, "float32", "NaN")],
)
def test_what_is_not_finite_is_refused(tmp_path, value, dtype, told):
    dataset, folder = as_dataset(tmp_path)
    features = {n: dataclasses.replace(f, dtype=dtype) for n, f in records.load(folder).buckets[0].features.items()}
    arrays = {n: np.array(getattr(dataset, n)[0]) for n in records.ARRAYS}
    arrays["logvar"].flat[3] = value
    with pytest.raises(UserError, match=f"record a/b: logvar holds values that .*{told}"), records.ShardWriter(
        tmp_path, "b", features, unit=0, units=1
    ) as writer:
        writer.write(arrays, key="a/b", caption="", provenance={})
    assert not list((tmp_path / "b" / records.VERSION).iterdir())


DAMAGED = {
    "missing": (lambda path: path.unlink(), "missing|no manifest.json"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "prepared data"),
    "empty": (lambda path: path.write_bytes(b""), "prepared data"),
    "other": (lambda path: path.write_bytes(b"{}" * 40), "prepared data"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_of_any_file_is_one_line(tmp_path, damage):
    _, folder = as_dataset(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 5
    for number, file in enumerate(files):
        _, copy = as_dataset(tmp_path, f"copy{number}")
        harm, expected = DAMAGED[damage]
        harm(copy / file)
        with pytest.raises(UserError, match=expected) as error:
            records.load(copy)
        assert str(error.value).startswith(f"prepared data {copy}: ") and "\n" not in str(error.value)


def test_a_changed_byte_of_a_record_is_found_when_it_is_read(tmp_path):
    dataset, folder = as_dataset(tmp_path)
    (path,) = folder.rglob("train.*")
    raw = bytearray(path.read_bytes())
    place = raw.find(dataset.mean[3].tobytes())
    raw[place + 5] ^= 1
    path.write_bytes(raw)
    bucket = records.load(folder).buckets[0]
    np.testing.assert_array_equal(bucket[2]["mean"], dataset.mean[2])
    for read in (bucket.__getitem__, bucket.describe):
        with pytest.raises(UserError, match="record 3 is damaged") as error:
            read(3)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda told: told.update(format_version=9), "format 9, expected 1"),
        (lambda told: told.update(buckets=[]), "unreadable"),
        (lambda told: told.pop("scale"), "unreadable"),
        (lambda told: told["scale"].update(scale=[2.0]), "fingerprint differs"),
        (lambda told: told["buckets"]["2x4x4"]["features"]["mean"].update(dtype="object"), "unreadable"),
        (lambda told: told["buckets"]["2x4x4"]["features"]["mean"].update(shape=[2, 4]), "fingerprint differs"),
        (lambda told: told["buckets"]["2x4x4"]["shards"][0].update(bytes=7), "expected 7"),
        (lambda told: told.update(units="many"), "unreadable"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path, change, expected):
    _, folder = as_dataset(tmp_path)
    told = json.loads((folder / "manifest.json").read_text())
    change(told)
    (folder / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=expected) as error:
        records.load(folder)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_datasets_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no such folder; make it with sdv prepare"):
        records.load(tmp_path / "none")
    with pytest.raises(UserError, match="no manifest.json there"):
        records.load(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="earlier version"):
        records.load(tmp_path)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match="run the same sdv prepare again"):
        records.load(tmp_path)
