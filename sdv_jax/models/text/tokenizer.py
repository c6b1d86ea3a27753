"""Prompts to token ids, with the tokenizer that came with the checkpoint; transformers reads it, from disk only."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdv_jax.errors import UserError

logger = logging.getLogger(__name__)


class Tokenizer:
    """The tokenizer saved in `folder` (a pipeline's `tokenizer/`): no network, no download cache.

    Raises `UserError` when the folder is missing, has no whole vocabulary or transformers cannot read it.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = Path(folder)
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"tokenizer: {folder} has no tokenizer_config.json; expected a pipeline's tokenizer folder")
        vocabulary_size(folder)  # transformers would go without a vocabulary, or ask for tiktoken to read a damaged one
        from transformers import AutoTokenizer  # heavy, and needed only once a prompt is to be read

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # whatever the readers of json, sentencepiece and tokenizers raise for a broken file
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"tokenizer: transformers cannot read {folder}: {first}") from error

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


def vocabulary_size(folder: Path) -> int:
    """How many tokens the files of a tokenizer folder hold, sentinels that transformers adds while loading not counted.

    Raises `UserError` when neither spiece.model nor tokenizer.json is there, or one of them is damaged.
    """
    readers = {"spiece.model": _pieces, "tokenizer.json": _entries}
    found = [name for name in readers if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: no vocabulary, neither {' nor '.join(readers)}; restore the tokenizer's files")
    sizes = []
    for name in found:
        try:
            sizes.append(readers[name]((folder / name).read_bytes()))
        except Exception as error:  # whatever the readers of protobuf and json raise for bytes that are neither
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{folder / name}: damaged ({reason}); restore the file from its source") from None
    return max(sizes)


def _pieces(raw: bytes) -> int:
    """Pieces of a SentencePiece model. The two specs come last in the file: without them it was cut between pieces."""
    from sentencepiece import sentencepiece_model_pb2  # as heavy as transformers' own reader, which uses it too

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(raw)
    if not (model.pieces and model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise ValueError("it ends before its last part")
    return len(model.pieces)


def _entries(raw: bytes) -> int:
    """Tokens of a tokenizers file, whose model maps them to ids or, if it is a unigram one, lists them."""
    content = json.loads(raw)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no model in it")
    vocabulary = content["model"].get("vocab")
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        raise ValueError("no vocabulary in it")
    return len(vocabulary)
