"""The written-down tokenizer against transformers and sentencepiece, which read it as they read T5's."""

import pytest

from sdv_jax.small_world import all_captions, build_tokenizer

TEXTS = [*all_captions(), "", "Hello, World! 42", "a  subject   over sand ", "sandy grassland", "é"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.T5Tokenizer.from_pretrained(folder)


def test_the_bytes_are_the_same_every_time_and_few(folder, tmp_path):
    assert build_tokenizer(tmp_path) == 120
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
        assert file.stat().st_size < 3000


def test_transformers_reads_it_as_t5(tokenizer):
    assert type(tokenizer).__name__ == "T5Tokenizer"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 120


def test_every_word_is_one_piece_and_captions_are_short(tokenizer):
    assert tokenizer.tokenize("a <cls> subject drifting left over sand") == [
        "▁a", "▁<", "cls", ">", "▁subject", "▁drifting", "▁left", "▁over", "▁sand",
    ]
    for text in all_captions():
        ids = tokenizer(text).input_ids
        assert 2 not in ids and ids[-1] == 1 and len(ids) <= 10
        assert len(tokenizer.tokenize(text.replace("<cls> ", ""))) == len(text.replace("<cls> ", "").split())


def test_padding_and_truncation(tokenizer):
    batch = tokenizer(TEXTS, padding="max_length", max_length=16, truncation=True, add_special_tokens=True).input_ids
    assert {len(ids) for ids in batch} == {16}
    assert batch[0][len(TEXTS[0].split()) + 1 :] == [0] * (15 - len(TEXTS[0].split()))
    assert tokenizer("subject " * 40, max_length=16, truncation=True).input_ids[-1] == 1


def test_reloading_and_sentencepiece_give_the_same_ids(folder, tokenizer, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == processor.encode(text) + [1] == again(text).input_ids
