"""What all importers do alike: reading text, staying within the set's folder, telling videos from pictures."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sdv_jax.data.importers.item import Clip, Item, Picture, Rejected, plain
from sdv_jax.errors import UserError, of_the_machine

VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv", ".gif"
)  # fmt: skip
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
JSON_ERRORS = (ValueError, RecursionError)  # of json.loads: mistakes, numbers too long for Python, and nesting


def check_folder(path: Path, *, what: str) -> Path:
    if not os.path.isdir(path):
        found = "is a file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{what} {path} {found}; give the folder of the set")
    return path


def read_text(path: Path, *, what: str) -> str:
    """A file of the whole set as text: UTF-8, with or without a byte order mark.

    Raises UserError that names the file, and the byte where it stops being UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}; check the path") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise UserError(
            f"{what} {path} is not UTF-8: byte {at} is 0x{content[at]:02x}; save it as UTF-8"
        ) from error


def read_lines(path: Path, *, what: str) -> list[str]:
    """Its lines. Only a newline ends a line, the last one too: captions may hold other separators."""
    lines = [line.rstrip("\r") for line in read_text(path, what=what).split("\n")]
    return lines if lines[-1] else lines[:-1]


def read_json(path: Path, *, what: str):
    """Raises UserError with the place of a mistake."""
    text = read_text(path, what=what)
    try:
        return json.loads(text)
    except JSON_ERRORS as error:
        line = f"line {error.lineno}, " if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{what} {path} is not JSON ({line}{json_mistake(error)}); repair the file") from error


def json_mistake(error: Exception) -> str:
    """What one of JSON_ERRORS says of a line, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: {error.msg}"
    return "too deep" if isinstance(error, RecursionError) else "a number of thousands of digits"


def read_caption_file(path: Path) -> str:
    """The caption of one item, from a file of its own."""
    if not os.path.isfile(path):
        raise Rejected("no caption", f"{path} does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption is not UTF-8", f"{path}: byte {error.start}") from error
    except OSError as error:
        if of_the_machine(error):
            raise
        raise Rejected("no permission", f"{path} cannot be read ({error.strerror})") from error
    return caption(text, where=str(path))


def caption(value, *, where: str) -> str:
    """A caption without the white space around it, of whatever length: the tokenizer cuts what is too long."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Rejected("no caption", f"{where} has none")
    if not isinstance(value, str):
        raise Rejected("no caption", f"{where}: expected text, found {type(value).__name__}")
    return value.strip()


def first_text(value):
    """`value`; of a list its first text that is not empty, or None: some sets give several captions."""
    if isinstance(value, list):
        return next((each for each in value if isinstance(each, str) and each.strip()), None)
    return value


def walk(root: Path) -> Iterator[str]:
    """Paths from `root` of the files in it and in the folders below; nothing hidden.

    Links to folders are followed. A folder that can be reached twice comes once, under its own path rather than a
    link's, so that links to each other end. Raises UserError for a folder that cannot be read.
    """
    seen, waiting = set(), [str(root)]
    while waiting:
        links = []
        for start in waiting:
            for place, folders, names in os.walk(start, onerror=_unreadable):
                real = os.path.realpath(place)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                links += [path for path in (os.path.join(place, name) for name in folders) if os.path.islink(path)]
                shown = sorted(name for name in names if not name.startswith("."))
                yield from (os.path.relpath(os.path.join(place, name), root) for name in shown)
        waiting = links


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"folder {error.filename} cannot be read ({error.strerror}): its files would be missing; make it readable, or "
        "move it out of the set"
    ) from error


def path_key(root: Path, name: str) -> str:
    """The path `name` of a set as a key: from `root`, in one spelling however the set writes it."""
    path = os.path.normpath(name)
    if os.path.isabs(path) or path.startswith(os.pardir):  # else it is what relpath gives, at ten times its cost
        path = os.path.relpath(os.path.join(root, path), root)
    return plain(path)


def file_inside(root: Path, name, *, where: str) -> Path:
    """The file `name` of a set, which lies in `root` or below.

    Links are followed: who lays them into the folder wants it.

    Raises:
      Rejected: no name, a name that leads out of `root`, or no such file.
    """
    if not isinstance(name, str) or not name.strip():
        raise Rejected("no file", f"{where} names no file")
    base = os.path.normpath(os.path.abspath(root))
    path = os.path.normpath(os.path.join(base, name))
    if os.path.commonpath([base, path]) != base:
        raise Rejected("path outside the set", f"{where}: {name} is not in {root}")
    if not os.path.isfile(path):
        found = "is not a file" if os.path.exists(path) else "does not exist"
        raise Rejected("file missing", f"{where}: {name} {found} in {root}")
    return Path(path)


def target(path: Path, *, kind: str | None = None) -> Picture | Clip:
    """What `path` is by its suffix, or by `kind` ("video" or "image") where the set says it."""
    kind = kind or kind_of(path)
    if kind == "video":
        return Clip(path)
    if kind == "image":
        return Picture(path)
    raise Rejected("unknown file type", f"{path} is neither a video nor a picture by its name")


def kind_of(path: Path) -> str | None:
    """ "video", "image", or None for other files."""
    suffix = path.suffix.lower()
    return "video" if suffix in VIDEO_SUFFIXES else "image" if suffix in PICTURE_SUFFIXES else None


def checked(item: Item) -> Item:
    """`item`, whose texts can be written as UTF-8: names of files and escapes in JSON need not be."""
    if plain(item.caption) != item.caption:
        raise Rejected("caption is not UTF-8", f"{item.key}: {item.caption[:100]}")
    provenance = {name: plain(value) if isinstance(value, str) else value for name, value in item.provenance.items()}
    return replace(item, provenance=provenance)


def first_of(row: Mapping, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)
