"""Prompts to token ids, with the tokenizer that came with the checkpoint; transformers reads it, from disk only."""

import functools
import html
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import numpy as np

from sdv_jax.errors import UserError, one_line

logger = logging.getLogger(__name__)


class Tokenizer:
    """The tokenizer saved in `folder` (a pipeline's `tokenizer/`): no network, no download cache.

    Raises `UserError` when the folder is missing, has no whole vocabulary or transformers cannot read it.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"tokenizer: {folder} has no tokenizer_config.json; expected a pipeline's tokenizer folder")
        check_vocabulary(folder)  # transformers would go without one, or ask for tiktoken to read a damaged one
        from transformers import (
            AutoTokenizer,
            PreTrainedTokenizerFast,
        )  # heavy, needed only once a prompt is to be read

        # The class for T5 that AutoTokenizer would choose builds its own tokenizer around the vocabulary of a
        # tokenizer.json, with 2 as the id of unknown characters, where UMT5's file says 3. It is also slower.
        reader = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        try:
            self._tokenizer = reader.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # whatever the readers of json, sentencepiece and tokenizers raise for a broken file
            raise UserError(f"tokenizer: transformers cannot read {folder}: {one_line(error)}") from error

    def tokenize(self, texts: str | Sequence, *, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask) of a string or a list of them, int32 [b, max_length] each.

        Short prompts are padded at the end; long ones are cut, with the end-of-text token kept, and one logged warning
        names what went, as diffusers does. The mask is 1 on tokens and 0 on padding.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError("prompt: the list of prompts is empty; give at least one")
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"prompt: expected text, found {type(text).__name__}")
        whole = self._tokenizer(texts, verbose=False)["input_ids"]
        # The last id of a whole prompt is the end-of-text token, which the cut prompt keeps in its last place.
        cut = [self._tokenizer.decode(ids[max_length - 1 : -1]) for ids in whole if len(ids) > max_length]
        if cut:
            logger.warning(
                "prompt is longer than %d tokens and was cut; ignored: %s", max_length, " | ".join(map(repr, cut))
            )
        encoded = self._tokenizer(texts, padding="max_length", max_length=max_length, truncation=True, verbose=False)
        ids, mask = (np.asarray(encoded[name], np.int32) for name in ("input_ids", "attention_mask"))
        return ids, mask

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has uncut, the end-of-text token included."""
        return [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]


def clean_wan(text: str) -> str:
    """A prompt as diffusers' `WanPipeline` cleans it: mojibake and HTML mended, runs of blanks made one."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: texts from the web are often escaped twice
    return re.sub(r"\s+", " ", text).strip()


def check_vocabulary(folder: Path) -> None:
    """Raises `UserError` when neither spiece.model nor tokenizer.json is in `folder`, or one of them is damaged."""
    readers = {"spiece.model": _check_pieces, "tokenizer.json": _check_entries}
    found = [name for name in readers if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no vocabulary, neither {' nor '.join(readers)}; restore the tokenizer's files")
    for name in found:
        stat = (folder / name).stat()
        if reason := _damage(readers[name], folder / name, stat.st_size, stat.st_mtime_ns):
            raise UserError(f"{folder / name}: damaged ({reason}); restore the file from its source")


@functools.lru_cache(maxsize=16)
def _damage(check: Callable[[bytes], None], file: Path, size: int, changed: int) -> str | None:
    """What is wrong with `file`. The answer is kept for as long as size and time of change are the same.

    A model's folder is checked whenever a part of it is opened, and UMT5's tokenizer.json takes half a second.
    """
    try:
        return check(file.read_bytes())
    except Exception as error:  # whatever the readers of protobuf and json raise for bytes that are neither
        return one_line(error)


def _check_pieces(raw: bytes) -> None:
    """Reads a SentencePiece model. The two specs come last in the file: without them it was cut between pieces."""
    from sentencepiece import sentencepiece_model_pb2  # as heavy as transformers' own reader, which uses it too

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(raw)
    if not (model.pieces and model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise ValueError("it ends before its last part")


def _check_entries(raw: bytes) -> None:
    """Reads a tokenizers file, whose model maps tokens to ids or, if it is a unigram one, lists them."""
    content = json.loads(raw)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no model in it")
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        raise ValueError("no vocabulary in it")
