"""Reference images as tokens: their latents, which tokens stay, and what leaving some out means in the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.adapters.reference import keep_index, kept_count
from tests.parity.compare import assert_close, relative_error
from tests.tiny_transformer import inputs, make, run

TOKENS = 6  # of one reference at 4 × 6 latents and patches of 2


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize(
    ("tokens", "drop", "count"),
    [(1350, 0.5, 675), (1350, 0.0, 1350), (7, 0.5, 4), (9, 0.1, 8), (6, 0.9, 1), (6, 1.0, 1)],
)
def test_kept_count(tokens, drop, count):
    """round((1 - drop) · tokens), ties to even, and never nothing: an empty reference is another program."""
    assert kept_count(tokens, drop) == count
    assert keep_index(jax.random.key(0), 2, tokens, drop).shape == (2, count)


def test_kept_tokens_are_drawn_without_replacement_and_sorted():
    index = np.asarray(keep_index(jax.random.key(0), 400, 10, 0.3))
    assert index.shape == (400, 7)
    assert (np.diff(index, axis=1) > 0).all()
    assert index.min() == 0 and index.max() == 9
    assert len(np.unique(index, axis=0)) > 80  # of the 120 there are
    # Every token is kept in 280 of the 400 examples, give or take five standard deviations.
    np.testing.assert_allclose(np.bincount(index.ravel(), minlength=10), 280, atol=5 * (400 * 0.3 * 0.7) ** 0.5)
    np.testing.assert_array_equal(index, keep_index(jax.random.key(0), 400, 10, 0.3))
    assert not np.array_equal(index, keep_index(jax.random.key(1), 400, 10, 0.3))


def test_keeping_every_token_drops_nothing(model):
    given = inputs(references=2)
    everything = jnp.tile(jnp.arange(2 * TOKENS), (2, 1))
    assert_close(run(model, given, everything), run(model, given), relative=1e-5)


def test_kept_tokens_keep_their_positions(model):
    """Attention knows tokens by their positions alone, so the order in which kept ones are listed must not matter."""
    given = inputs(references=2)
    index = keep_index(jax.random.key(3), 2, 2 * TOKENS, 0.5)
    expected = run(model, given, index)
    assert_close(run(model, given, index[:, ::-1]), expected, relative=1e-5)
    assert relative_error(run(model, given, jnp.roll(index, 1, axis=0)), expected) > 1e-3  # each example keeps its own
    assert relative_error(run(model, given), expected) > 1e-3


def test_dropped_tokens_do_not_matter(model):
    latents, text, timesteps, reference = inputs(references=1)
    left = jnp.tile(jnp.array([0, 3]), (2, 1))  # the first column of 2 × 3 patches
    other = reference.at[:, :, :, 2:].add(5.0)
    found = run(model, (latents, text, timesteps, other), left)
    np.testing.assert_array_equal(found, run(model, (latents, text, timesteps, reference), left))
    assert relative_error(run(model, (latents, text, timesteps, other)), found) > 1e-3


def test_a_second_reference_counts_and_so_does_the_order(model):
    latents, text, timesteps, reference = inputs(references=2)
    both = run(model, (latents, text, timesteps, reference))
    assert both.shape == latents.shape
    assert relative_error(run(model, (latents, text, timesteps, reference[:, :1])), both) > 1e-3
    assert relative_error(run(model, (latents, text, timesteps, reference[:, ::-1])), both) > 1e-3


def test_examples_do_not_see_each_others_reference(model):
    latents, text, timesteps, reference = inputs(references=1)
    other = reference.at[1].add(1.0)
    before, after = (run(model, (latents, text, timesteps, r)) for r in (reference, other))
    np.testing.assert_array_equal(before[0], after[0])
    assert relative_error(after[1], before[1]) > 1e-3
