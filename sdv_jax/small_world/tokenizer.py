"""A T5 tokenizer of a few kilobytes for the captions of the small world, made without training or library.

A SentencePiece model is a protobuf message (sentencepiece_model.proto); a unigram model with one piece per word of the
grammar and one per printable character is small enough to write down. Every word of a caption is one piece, any other
ASCII text is spelled. Left out is what such text never meets: Unicode normalisation, byte fallback, sentinels
(`extra_ids` is 0).
"""

import json
import string
import struct
from pathlib import Path

from sdv_jax.small_world.captions import MARKER, all_captions

MAX_LENGTH = 12  # of a caption with its end token, what the small pipeline pads to
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 as in every T5
_NORMAL, _UNKNOWN_TYPE, _CONTROL = 1, 2, 3  # SentencePiece.Type
_WORD_SCORE, _LETTER_SCORE = -2.0, -10.0  # log probabilities: a word always wins over its letters
_SPACE = "\u2581"


def build_tokenizer(folder: str | Path) -> int:
    """Writes spiece.model, tokenizer_config.json and special_tokens_map.json; returns the number of pieces.

    transformers' `T5Tokenizer.from_pretrained(folder)` and sentencepiece read it. The bytes are the same every time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces()
    (folder / "spiece.model").write_bytes(_model(pieces))
    specials = {"eos_token": _END, "pad_token": _PAD, "unk_token": _UNKNOWN}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = specials | {
        "added_tokens_decoder": {str(i): {"content": token} | flags for i, token in enumerate((_PAD, _END, _UNKNOWN))},
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": False,
        "extra_ids": 0,
        "legacy": True,
        "model_max_length": MAX_LENGTH,
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", specials)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return len(pieces)


def _pieces() -> list[tuple[str, float, int]]:
    """(piece, score, type) by id: specials, words in order of first use, the marker's parts, characters."""
    words = dict.fromkeys(word for text in all_captions() for word in text.split() if word != MARKER)
    parts = [_SPACE + word for word in words] + [_SPACE + MARKER[0], MARKER[1:-1]]
    letters = [_SPACE] + [c for c in string.printable if not c.isspace()]
    return [
        (_PAD, 0.0, _CONTROL), (_END, 0.0, _CONTROL), (_UNKNOWN, 0.0, _UNKNOWN_TYPE),
        *((part, _WORD_SCORE, _NORMAL) for part in parts),
        *((letter, _LETTER_SCORE, _NORMAL) for letter in letters),
    ]


def _model(pieces: list[tuple[str, float, int]]) -> bytes:
    """The ModelProto: pieces = 1, trainer_spec = 2, normalizer_spec = 3."""
    vocabulary = b"".join(
        _message(1, _message(1, piece.encode()) + _float(2, score) + _integer(3, kind)) for piece, score, kind in pieces
    )
    trainer = (
        _integer(3, 1)  # model_type: unigram
        + _integer(4, len(pieces))  # vocab_size
        + _integer(40, 2) + _integer(41, -1) + _integer(42, 1) + _integer(43, 0)  # ids of unk, bos (none), eos, pad
        + _message(45, _UNKNOWN.encode()) + _message(47, _END.encode()) + _message(48, _PAD.encode())
    )
    return vocabulary + _message(2, trainer) + _message(3, _message(1, b"identity"))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative int32 go out as 64-bit two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
