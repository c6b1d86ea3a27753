"""Blocks gathered into C order bit by bit, and the search for values that are no numbers."""

import ml_dtypes
import numpy as np
import pytest

from sdv_jax.checkpoints.packing import Buffers, all_finite, packed

KINDS = [np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((300, 520), (1, 0)),
        ((7, 1), (1, 0)),
        ((40, 30, 3, 3, 3), (2, 3, 4, 1, 0)),
        ((30, 40, 1, 1), (2, 3, 1, 0)),
        ((0, 5), (1, 0)),
    ],
)
def test_packed(kind, shape, axes):
    values = np.random.default_rng(0).standard_normal(shape).astype(kind).transpose(axes)[..., :-1]
    found = packed(values)
    assert found.flags.c_contiguous and found.dtype == kind and found.shape == values.shape
    assert found.tobytes() == np.ascontiguousarray(values).tobytes()


def test_what_is_packed_already_is_not_copied():
    for values in (np.arange(6.0).reshape(2, 3), np.float32(3).reshape(())):
        assert packed(values) is values
    assert packed(np.arange(6)[::2]).tolist() == [0, 2, 4]


def test_buffers_take_turns():
    buffers = Buffers(2)
    first, second = (buffers.empty((2, 3), np.dtype(np.float32)) for _ in range(2))
    first[...], second[...] = 1, 2
    assert (first == 1).all()
    third = packed(np.arange(4, dtype=np.float32).reshape(2, 2).T, buffers)
    assert np.shares_memory(first, third) and (second == 2).all()
    assert third.tolist() == [[0, 2], [1, 3]]
    larger = buffers.empty((100,), np.dtype(ml_dtypes.bfloat16))
    assert larger.shape == (100,) and not np.shares_memory(larger, second)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 2**17, 2**17 + 1])
def test_every_place_is_searched(kind, bad, size):
    values = np.zeros(size, kind)
    values[0] = ml_dtypes.finfo(kind).max
    assert all_finite(values) and all_finite(-values) and all_finite(values.reshape(1, -1))
    for place in (0, size - 1):
        spoiled = values.copy()
        spoiled[place] = bad
        assert not all_finite(spoiled)


def test_nothing_is_finite():
    assert all_finite(np.zeros(0, np.float32)) and all_finite(np.float32(1).reshape(()))
