"""Sets of every layout that are wrong as a whole, or hold an item that only this layout can have."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.data.importers.sets import parquet, png, subject_row, video, views
from tests.data.importers.test_opens2v import record, region
from tests.data.importers.test_pexels import row as pexels_row


def _table(name: str, content: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        video(folder / "v.mp4")
        (folder / name).write_bytes(content)

    return make


def _lists(prompts: bytes, videos: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        video(folder / "v.mp4")
        (folder / "prompts.txt").write_bytes(prompts)
        (folder / "videos.txt").write_bytes(videos)

    return make


def _captioned(content: bytes | None) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        video(folder / "v.mp4")
        if content is not None:
            (folder / "v.txt").write_bytes(content)

    return make


def _linked(folder: Path) -> None:
    elsewhere = folder.with_name(f"{folder.name} elsewhere")
    elsewhere.mkdir()
    _captioned(b"A cat.")(elsewhere)
    (folder / "part").symlink_to(elsewhere)


def _subjects(row: dict) -> Callable[[Path], object]:
    return lambda folder: parquet(folder / "a.parquet", [row])


def _pexels(*, fetched: bool = True, **changes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        parquet(folder / "p.parquet", [pexels_row(1, **changes)])
        if fetched:
            video(folder / "videos/1.mp4")

    return make


def _null_first(folder: Path) -> None:
    (folder / "part1.json").write_text(json.dumps({"id_none": None, "id_one": record("one")}))


def _opens2v(mask=None, frame=3, **changes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        video(folder / "videos/part1/one.mp4", frames=8)
        content = record("one", subjects={"cup": region(10, 6, 26, 24)}, **changes)
        content["annotation"]["ann_frame_data"]["ann_frame_idx"] = frame
        if mask is not None:
            content["annotation"]["mask_annotation"]["3"]["1"] |= mask
        (folder / "part1.json").write_text(json.dumps({"id_one": content}))

    return make


_QUALITY = {"compositeStructure": 5, "objectConsistency": None, "imageQuality": 5}
_TEXT_SCORES = {"compositeStructure": "5", "objectConsistency": "5", "imageQuality": "5"}
_LONG_NUMBER = b'{"video": "v.mp4", "prompt": "A cat", "n": ' + b"1" * 5000 + b"}"
SETS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a csv in Latin-1": ("metadata", _table("metadata.csv", "video,prompt\nv.mp4,Café\n".encode("latin-1"))),
    "a csv in UTF-16": ("metadata", _table("metadata.csv", "video,prompt\nv.mp4,A cat\n".encode("utf-16"))),
    "a csv without a head": ("metadata", _table("metadata.csv", b"v.mp4,A cat\nv.mp4,A dog\n")),
    "a csv in capitals": ("metadata", _table("metadata.csv", b"Video,Prompt\nv.mp4,A cat\n")),
    "a csv with an empty first line": ("metadata", _table("metadata.csv", b"\nvideo,prompt\nv.mp4,A cat\n")),
    "a csv with semicolons": ("metadata", _table("metadata.csv", b"video;prompt\nv.mp4;A cat\n")),
    "a quote that never ends": ("metadata", _table("metadata.csv", b'video,prompt\nv.mp4,"A cat\n')),
    "a quotation mark within a caption": (
        "metadata",
        _table("metadata.csv", b'video,prompt\nv.mp4,"A "big" cat"\nv.mp4,A dog\n'),
    ),
    "a caption of 200,000 characters": ("metadata", _table("metadata.csv", b"video,prompt\nv.mp4," + b"cat " * 50000)),
    "a comma too many": ("metadata", _table("metadata.csv", b"video,prompt\nv.mp4,A cat, running\nv.mp4,A dog\n")),
    "no row that can be read": ("metadata", _table("metadata.csv", b"video,prompt\nv.mp4,A cat, running\n")),
    "a column twice": ("metadata", _table("metadata.csv", b"video,video\nv.mp4,v.mp4\n")),
    "a head and no rows": ("metadata", _table("metadata.csv", b"video,prompt\n")),
    "an empty csv": ("metadata", _table("metadata.csv", b"")),
    "half a json": ("metadata", _table("metadata.json", b'[{"video": "v.mp4"')),
    "json lines in a json": (
        "metadata",
        _table("metadata.json", b'{"video": "v.mp4", "prompt": "A cat"}\n{"video": "v.mp4", "prompt": "A dog"}\n'),
    ),
    "a json of one row": ("metadata", _table("metadata.json", b'{"video": "v.mp4", "prompt": "A cat"}')),
    "a row with a number of 5,000 digits": (
        "metadata",
        _table("metadata.jsonl", _LONG_NUMBER + b'\n{"video": "v.mp4", "prompt": "A dog"}'),
    ),
    "a json with a number of 5,000 digits": ("metadata", _table("metadata.json", b"[" + _LONG_NUMBER + b"]")),
    "a list of captions": ("metadata", _table("metadata.json", b'[{"file_path": "v.mp4", "text": ["", "A cat"]}]')),
    "a type in capitals": (
        "metadata",
        _table("metadata.json", b'[{"file_path": "v.mp4", "text": "A cat", "type": "Video"}]'),
    ),
    "a file in the second column": ("metadata", _table("metadata.csv", b"video,file,prompt\n,v.mp4,A cat\n")),
    "more prompts than videos": ("text_lists", _lists(b"one\ntwo\n", b"v.mp4\n")),
    "prompts in Latin-1": ("text_lists", _lists("Café\n".encode("latin-1"), b"v.mp4\n")),
    "lists without a line": ("text_lists", _lists(b"", b"\n")),
    "an empty last prompt": ("text_lists", _lists(b"\n", b"v.mp4\n")),
    "a folder without media": ("folder", lambda folder: None),
    "no caption beside a clip": ("folder", _captioned(None)),
    "a caption of spaces": ("folder", _captioned(b" \n ")),
    "a caption in Latin-1": ("folder", _captioned("Café".encode("latin-1"))),
    "a link to a folder": ("folder", _linked),
    "a folder without parquet": ("subjects200k", lambda folder: None),
    "a parquet that is none": ("subjects200k", _table("a.parquet", b"PAR1 no PAR1")),
    "a parquet without descriptions": ("subjects200k", _subjects({"image": 1, "collection": "x"})),
    "a null description": ("subjects200k", _subjects(subject_row(description_0=None))),
    "all descriptions null": ("subjects200k", _subjects(subject_row() | {"description": None})),
    "null pictures": ("subjects200k", _subjects(subject_row() | {"image": None})),
    "a score is null": ("subjects200k", _subjects(subject_row() | {"quality_assessment": _QUALITY})),
    "a score that is NaN": (
        "subjects200k",
        _subjects(subject_row() | {"quality_assessment": _QUALITY | {"objectConsistency": float("nan")}}),
    ),
    "all scores null": ("subjects200k", _subjects(subject_row(scores=None))),
    "scores of text": ("subjects200k", _subjects(subject_row() | {"quality_assessment": _TEXT_SCORES})),
    "descriptions of text": ("subjects200k", _subjects(subject_row() | {"description": "A cup."})),
    "pictures as plain bytes": ("subjects200k", _subjects(subject_row() | {"image": png(views())})),
    "scores below five": ("subjects200k", _subjects(subject_row(scores=(5, 4, 5)))),
    "a picture of one view": ("subjects200k", _subjects(subject_row(image=png(views()[:, :60])))),
    "bytes that are no picture": ("subjects200k", _subjects(subject_row(image=b"no picture"))),
    "a clip never fetched": ("pexels", _pexels(fetched=False)),
    "a null title": ("pexels", _pexels(title=None)),
    "a null address": ("pexels", _pexels(address=None)),
    "an address that is none": ("pexels", _pexels(address="http://[bad")),
    "addresses of numbers": ("pexels", lambda folder: parquet(folder / "p.parquet", [pexels_row(1) | {"video": 5}])),
    "an address with ..": ("pexels", _pexels(address="https://x/..%2Foutside.mp4")),
    "run lengths that are none": ("opens2v", _opens2v({"counts": "~~~"})),
    "a mask of another size": ("opens2v", _opens2v({"size": [20, 20]})),
    "a crop outside the frame": ("opens2v", _opens2v(crop=[400, 440, 300, 330])),
    "a crop of text": ("opens2v", _opens2v(crop="none")),
    "a crop without an end": ("opens2v", _opens2v(crop=[float("inf"), 44, 2, 30])),
    "a clip from before its beginning": ("opens2v", _opens2v(face_cut=[-3, -1])),
    "a clip to a text": ("opens2v", _opens2v(face_cut=[0, "5"])),
    "a clip to 5.0": ("opens2v", _opens2v(face_cut=[0, 5.0])),
    "a record that is null": ("opens2v", _null_first),
    "an annotated frame from before the beginning": ("opens2v", _opens2v(frame=-3)),
    "captions in a list": ("opens2v", _opens2v(face_cap_qwen=None, cap=["A cup."])),
    "no part of the clip": ("opens2v", _opens2v(face_cut=[5, 5])),
}
