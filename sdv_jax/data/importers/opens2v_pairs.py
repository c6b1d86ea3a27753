"""Cross-frame pairs of OpenS2V-5M: the same subject in two clips of one video.

The set's code has written them in two ways: clips as part/id with the number of the subject's mask in either
(cross_frames_pairs.json, grouped by video), and before that bare ids with the subject's class name only (a file for
each video in cross-frames-images).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from sdv_jax.data.importers.item import plain
from sdv_jax.data.importers.reading import read_json
from sdv_jax.errors import UserError


@dataclass(frozen=True)
class Subject:
    """A subject of a clip, by the number of its mask, or where the pair gives none by its class name."""

    number: str | None
    name: str | None

    def numbers(self, mask_map: Mapping) -> list[str]:
        """Its number in a record's `mask_map`: several when others have its name, none when nothing has."""
        if self.number is not None:
            return [self.number]
        return [number for number, entry in mask_map.items() if entry["class_name"] == self.name]


class Pairs:
    """For each clip the others that show a subject of it again, and which subjects of theirs; in the file's order."""

    def __init__(self, path: Path, keys: Collection[str]):
        """`path` is a file of pairs or a folder of them; `keys` are the clips of the set, as part/id.

        Raises UserError: not such a file, or a bare id that several parts have.
        """
        self._others: dict[str, dict[str, dict[Subject, None]]] = {}
        pairs = _read(path)
        bare: dict[str, list[str]] = {clip: [] for pair in pairs for clip, _ in pair if clip not in keys}
        for key in keys:
            bare.get(key.partition("/")[2], []).append(key)
        for pair in pairs:
            (one, subject), (other, again) = ((_key(path, clip, bare), view) for clip, view in pair)
            self._others.setdefault(one, {}).setdefault(other, {})[again] = None
            self._others.setdefault(other, {}).setdefault(one, {})[subject] = None

    def __contains__(self, key: str) -> bool:
        return key in self._others

    def of(self, key: str) -> dict[str, tuple[Subject, ...]]:
        return {other: tuple(subjects) for other, subjects in self._others[key].items()}


def _key(path: Path, clip: str, bare: Mapping[str, list[str]]) -> str:
    """`clip` as part/id, or as it is when no part has it."""
    found = sorted(bare.get(clip, ())) or [clip]
    if len(found) > 1:
        raise UserError(
            f"OpenS2V pairs {path}: {clip} is in several parts ({', '.join(found)}); give the one json file that the "
            "pairs were made from"
        )
    return found[0]


def _read(path: Path) -> list[tuple[tuple[str, Subject], tuple[str, Subject]]]:
    """A file is a list of pairs, or an object of such lists by video."""
    pairs = []
    for file in tqdm(sorted(path.glob("*.json")) if path.is_dir() else [path], desc=path.name, delay=3):
        content = read_json(file, what="OpenS2V pairs")
        groups = list(content.values()) if isinstance(content, dict) else [content]
        if not all(isinstance(group, list) for group in groups):
            raise UserError(f"OpenS2V pairs {file} is no list of pairs and no object of such lists; give another file")
        pairs += [(_end(file, pair, "cur"), _end(file, pair, "aft")) for group in groups for pair in group]
    return pairs


def _end(path: Path, pair, side: str) -> tuple[str, Subject]:
    fields = pair if isinstance(pair, dict) else {}
    clip, number, name = (fields.get(f"{side}_{field}") for field in ("id", "class_id", "class_name"))
    numbered = isinstance(number, (str, int))
    if not isinstance(clip, str) or not (numbered or isinstance(name, str)):
        lacking = f"{side}_class_id and {side}_class_name" if isinstance(clip, str) else f"{side}_id"
        raise UserError(
            f"OpenS2V pairs {path}: a pair has no {lacking}; expected cur_id, aft_id, and of both the class_id or the "
            "class_name"
        )
    return plain(clip), Subject(str(number), None) if numbered else Subject(None, name)
