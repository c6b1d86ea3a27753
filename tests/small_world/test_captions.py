"""Every sentence of the grammar can be written and read back; anything else is refused in one line."""

import numpy as np
import pytest

from sdv_jax.errors import UserError
from sdv_jax.small_world import BACKGROUNDS, MOTIONS, Words, all_captions, caption, parse


@pytest.mark.parametrize("words, text", [
    (Words("sand", "drifting left", marked=True), "a <cls> subject drifting left over sand"),
    (Words("night", "resting"), "a subject resting over night"),
    (Words("snow"), "a subject over snow"),
])
def test_caption_and_parse_are_inverse(words, text):
    assert caption(words) == text
    assert parse(text) == words


def test_the_whole_grammar_is_read():
    texts = all_captions()
    assert len(set(texts)) == len(texts)
    assert {parse(text) for text in texts} == {
        Words(ground, motion, marked)
        for ground in BACKGROUNDS for motion in [None, *MOTIONS] for marked in (False, True)
    }


def test_synonyms_say_the_same():
    rng = np.random.default_rng(0)
    texts = {caption(Words("sand", "rising"), rng=rng) for _ in range(20)}
    assert texts == {"a subject rising over sand", "a subject moving up over sand"}
    assert {parse(text) for text in texts} == {Words("sand", "rising")}


@pytest.mark.parametrize("text, complaint", [
    ("a dog over sand", "cannot read"),
    ("a subject over lava", "unknown background 'lava'"),
    ("a subject flying over sand", "unknown motion 'flying'"),
    ("", "cannot read"),
])
def test_other_sentences_are_refused(text, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        parse(text)
    assert "\n" not in str(error.value)
