import dataclasses

import numpy as np
import pytest

from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale
from tests.train import tiny


def test_rows_are_those_of_the_arrays():
    dataset = tiny.dataset(5, frames=2, views=3)
    row = dataset[4]
    assert {name: array.shape for name, array in row.items()} == dataset.shapes
    np.testing.assert_array_equal(row["mean"], dataset.mean[4])
    assert dataset.describe(4) == {"key": "4", "caption": "caption 4"} and dataset.buckets == (dataset,)


def test_the_fingerprint_is_of_the_contents():
    dataset = tiny.dataset(5, frames=2, views=3)
    assert dataset.fingerprint == tiny.dataset(5, frames=2, views=3).fingerprint
    others = [tiny.dataset(5, frames=2, views=3, seed=1), dataclasses.replace(dataset, captions=tuple("abcde"))]
    assert all(other.fingerprint != dataset.fingerprint for other in others)


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
