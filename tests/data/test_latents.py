import dataclasses
import json

import numpy as np
import pytest

from sdv_jax.data import latents
from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale
from tests.train import tiny


def test_a_dataset_comes_back_as_it_was(tmp_path):
    dataset = tiny.dataset(5, frames=2, views=3, token_ids=True)
    latents.save(dataset, tmp_path)
    loaded = latents.load(tmp_path)
    assert loaded.captions == dataset.captions and loaded.scale == dataset.scale
    assert loaded.has_token_ids and isinstance(loaded.mean, np.memmap)
    for name in latents.ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(dataset, name))
        assert getattr(loaded, name).dtype == getattr(dataset, name).dtype


def test_a_batch_has_the_rows_asked_for():
    dataset = tiny.dataset(5, frames=2, views=3)
    batch = dataset.batch(np.array([4, 0]))
    assert set(batch) == {"mean", "logvar", "reference_mean", "reference_logvar", "text"}
    np.testing.assert_array_equal(batch["mean"], dataset.mean[[4, 0]])


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (3, 8), (1, 2)])
def test_every_epoch_shows_every_row_once(count, size):
    batches = -(-4 * count // size)
    rows = np.concatenate([latents.row_order(count, size, i, (0, 1)) for i in range(batches)])
    for epoch in range(3):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_order_is_a_function_of_seed_and_position():
    order = latents.row_order(100, 8, 5, (0, 1))
    np.testing.assert_array_equal(order, latents.row_order(100, 8, 5, (0, 1)))
    assert not np.array_equal(order, latents.row_order(100, 8, 5, (1, 1)))
    assert not np.array_equal(order, latents.row_order(100, 8, 5, (0, 0)))
    epochs = [latents.row_order(100, 100, i, (0, 1)) for i in range(2)]
    assert not np.array_equal(*epochs)


def test_iterating_from_a_step_gives_what_that_step_reads():
    stream = latents.Stream(tiny.dataset(7, frames=1, views=1), 3, (0, 0))
    batches = latents.StepBatches({"motion": stream}, [{"motion": i} for i in range(6)])
    iterator = latents.iterate(batches, 2)
    for step in range(2, 6):
        np.testing.assert_array_equal(next(iterator)["motion"]["mean"], stream[step]["mean"])
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mean": np.zeros((4, 1, 4, 4, 4))}, "one row per caption"),
        ({"logvar": np.zeros((5, 2, 4, 4, 4))}, "means and log-variances differ"),
        ({"captions": ()}, "found 0 captions"),
        ({"empty_text": np.zeros((2, 8))}, "empty_text"),
        ({"mean": np.zeros((5, 4, 4, 4))}, "moments have five axes"),
        ({"reference_mean": np.zeros((5, 0, 4, 4, 4))}, "none of them empty"),
        ({"scale": LatentScale.factor(float("nan"))}, "scale of the latents is \\(nan,\\)"),
        ({"scale": LatentScale((0.0, 1.0), (1.0,))}, "one per channel \\(4\\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, expected):
    with pytest.raises(UserError, match=expected):
        dataclasses.replace(tiny.dataset(5, frames=1, views=1), **changes)


def test_the_factor_of_the_first_prepared_data_is_read(tmp_path):
    latents.save(tiny.dataset(5, frames=1, views=1), tmp_path)
    about = json.loads((tmp_path / "dataset.json").read_text())
    del about["scale"]
    (tmp_path / "dataset.json").write_text(json.dumps(about | {"scaling_factor": 0.3}))
    assert latents.load(tmp_path).scale == LatentScale.factor(0.3)


def test_folders_that_are_not_datasets_are_refused(tmp_path):
    with pytest.raises(UserError, match="no dataset.json"):
        latents.load(tmp_path)
    latents.save(tiny.dataset(5, frames=1, views=1), tmp_path)
    about = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(about | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99, expected 1"):
        latents.load(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    np.save(tmp_path / "text.npy", np.zeros((5, 1, 8)))
    with pytest.raises(UserError, match="arrays have shapes"):
        latents.load(tmp_path)
    (tmp_path / "mean.npy").write_bytes(b"not an array")
    with pytest.raises(UserError, match="prepared data"):
        latents.load(tmp_path)
    (tmp_path / "mean.npy").unlink()
    with pytest.raises(UserError, match="unreadable"):
        latents.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "unreadable"),
        ("{}", "unreadable"),
        ("not json", "unreadable"),
        ({"captions": 3}, "unreadable"),
        ({"scaling_factor": "much"}, "unreadable"),
        ({"scale": [1.0]}, "unreadable"),
        ({"captions": ["one"]}, "one row per caption"),
    ],
)
def test_a_damaged_description_is_one_line_that_names_the_folder(tmp_path, text, expected):
    latents.save(tiny.dataset(5, frames=1, views=1), tmp_path)
    about = tmp_path / "dataset.json"
    about.write_text(text if isinstance(text, str) else json.dumps(json.loads(about.read_text()) | text))
    with pytest.raises(UserError, match=expected) as error:
        latents.load(tmp_path)
    assert str(error.value).startswith(f"prepared data {tmp_path}: ") and "\n" not in str(error.value)
