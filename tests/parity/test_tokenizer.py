"""Cleaning and tokenizing of prompts against diffusers' Wan pipeline and against the tokenizers library itself."""

import numpy as np
import pytest

diffusers = pytest.importorskip("diffusers")
tokenizers = pytest.importorskip("tokenizers")

from sdv_jax.models.text.tokenizer import Tokenizer, clean_wan  # noqa: E402

TEXTS = [
    "",
    "  A  red\tcube\n\n drifts \u00a0left\u2003over sand \r\n",
    "caf\u00c3\u00a9 na\u00c3\u00afve \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d",  # UTF-8 read as Latin text
    "\u201ccurly\u201d \u2018quotes\u2019 \ufb01ne \uff21\uff22 \x1b[31mred\x1b[0m \ufeffmark",
    "fish &amp; chips &amp;amp; peas &lt;b&gt; &amp;amp;lt; &quot;x&quot; &#233; &#x1c; &nbsp;&nbsp; &notin &unknown;",
    "\u955c\u5934\u5207\u6362\uff0c\u8272\u8c03\u8273\u4e3d\u3000\u8fc7\u66dd",
    "tabs\x0band\x0cfeeds\x1cand\x1fseparators\x85next\u2028line\u2029paragraph",
    "\ud83d\ude00 lone surrogates and \U0001f600 a face",
]


def garbage(count: int) -> list[str]:
    """Strings of characters and entities that one of the cleaning steps is about."""
    rng = np.random.default_rng(0)
    parts = [chr(n) for n in (*range(0x30), *range(0x7F, 0xC0), 0x200B, 0x2028, 0x3000, 0xFB01, 0xFEFF, 0x1F600)]
    parts += ["&amp;", "&lt;", "&#32;", "&#x85;", "&nbsp;", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "word", " "]
    return ["".join(rng.choice(parts, rng.integers(1, 12))) for _ in range(count)]


def test_prompts_are_cleaned_as_diffusers_does():
    pytest.importorskip("ftfy")
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in TEXTS + garbage(2000):
        assert clean_wan(text) == prompt_clean(text), repr(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As UMT5's: unigram pieces with 3 as the unknown one, sentinels beyond them, a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    pieces = ["<pad>", "</s>", "<s>", "<unk>", "\u2581", "\u2581a", "\u2581red", "\u2581cube", "c", "u", "b", "e"]
    scores = [0.0] * 4 + [-3.0, -2.0, -2.0, -2.0] + [-10.0] * 4
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=3))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    core.decoder = tokenizers.decoders.Metaspace()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{i}>" for i in range(3)],
    )
    path = tmp_path_factory.mktemp("pipeline") / "tokenizer"
    fast.save_pretrained(path)
    config = path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("PreTrainedTokenizerFast", "T5Tokenizer"))
    config.write_text(config.read_text().replace("TokenizersBackend", "T5Tokenizer"))
    assert "T5Tokenizer" in config.read_text()
    return path


def test_tokens_are_those_of_the_file(folder):
    """The class named in the config would call an unknown character 2."""
    texts = ["a red cube", "cub \u955c", "", "a <extra_id_1>"]
    ids, mask = Tokenizer(folder).tokenize(texts, max_length=512)
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for row, seen, text in zip(ids, mask, texts, strict=True):
        expected = core.encode(text).ids
        assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()
        assert seen.sum() == len(expected) and seen[: len(expected)].all()
    assert 3 in ids[1] and ids.shape == (4, 512)
