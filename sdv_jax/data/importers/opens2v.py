"""OpenS2V-5M: clips with a margin to cut away, and their subjects in one annotated frame (BestWishYsh, cc-by-4.0).

A crop is written x0, x1, y0, y1 and a bounding box x0, y0, x1, y1. Boxes and masks are in pixels of the cropped
frame; frame numbers are those of the whole file. So the set's own loader reads them (data_process/demo_dataloader.py).
"""

import math
import reprlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sdv_jax.data.importers.item import Clip, Frame, Item, Rejected, plain
from sdv_jax.data.importers.json_records import JsonRecords
from sdv_jax.data.importers.masks import Mask
from sdv_jax.data.importers.opens2v_pairs import Pairs, Subject
from sdv_jax.data.importers.reading import caption, checked, file_inside, first_text
from sdv_jax.errors import UserError

_CAPTIONS = ("face_cap_qwen", "cap")
_CUTS = ("face_cut", "cut")


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      videos: the folder of the videos; "" means `videos` beside the json files, or else their folder. A video lies in
        it, or in its folder of the json's name.
      classes: only subjects of these class names; () means all that the record does not tag as background.
      minimum_area: of a subject's mask, as a share of the frame; 1/32 is the set's own choice.
      maximum_overlap: a subject whose mask overlaps an earlier one's by more (intersection over union) is the same
        again under another name.
      most: references of an item.
      masked: white outside the mask; else the whole bounding box.
      pairs: the file of cross-frame pairs, or a folder of such files: references then come from other clips with the
        same subject, and clips without a pair are left out. "" takes them from the clip itself.
    """

    videos: str = ""
    classes: tuple[str, ...] = ()
    minimum_area: float = 1 / 32
    maximum_overlap: float = 0.8
    most: int = 6
    masked: bool = True
    pairs: str = ""


class Importer:
    """One item for each record, or for each that has a pair."""

    def __init__(self, path: Path, options: Options):
        self._options = options
        pairs = Path(options.pairs) if options.pairs else None
        if pairs is not None and not pairs.exists():
            raise UserError(f"OpenS2V pairs {pairs} does not exist; check the option pairs")
        self._parts = [JsonRecords(file, what="OpenS2V part") for file in _parts_of(path, pairs)]
        beside = self._parts[0].path.parent / "videos"
        self._videos = Path(options.videos) if options.videos else beside if beside.is_dir() else beside.parent
        if not self._videos.is_dir():
            raise UserError(f"OpenS2V videos {self._videos} is not a folder; check the option videos")
        places = [(p, r) for p, part in enumerate(self._parts) for r in range(len(part))]
        self._by_key = {self._key(place): place for place in reversed(places)}
        self._pairs = None if pairs is None else Pairs(pairs, self._by_key)
        self._places = [place for place in places if self._pairs is None or self._key(place) in self._pairs]
        if not self._places:
            raise UserError(f"OpenS2V pairs {pairs}: none of its clips is in {path}; give the json files of its parts")
        self.about = {"records": len(places), "chosen": len(self._places), "parts": len(self._parts)}

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        return self._key(self._places[index])

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, key = self._places[index], self.key(index)
        record = self._parts[place[0]][place[1]]
        try:
            metadata = record["metadata"]
            video = self._video(place, metadata)
            text = first_text([first_text(metadata.get(name)) for name in _CAPTIONS])
            item = Item(
                key=key, caption=caption(text, where=key), target=Clip(video, *_cut(metadata), _crop(metadata)),
                views=partial(self._references, place, record),
                provenance={"set": "OpenS2V-5M", "file": str(metadata["path"]), "record": key},
            )  # fmt: skip
        except _MALFORMED as error:
            raise _damaged(key, error) from error
        return checked(item)

    def _key(self, place: tuple[int, int]) -> str:
        part = self._parts[place[0]]
        return plain(f"{part.path.stem}/{part.keys[place[1]]}")

    def _video(self, place: tuple[int, int], metadata: dict) -> Path:
        part, name = self._parts[place[0]].path.stem, metadata["path"]
        folder = self._videos / part
        return file_inside(folder if folder.is_dir() else self._videos, name, where=self._key(place))

    def _references(self, place: tuple[int, int], record: dict) -> tuple[Frame, ...]:
        try:
            found = list(self._subjects(place, record)) if self._pairs is None else self._of_pairs(self._key(place))
        except _MALFORMED as error:
            raise _damaged(self._key(place), error) from error
        if not found:
            raise Rejected("no subject", f"{self._key(place)} has none of the wanted classes and area")
        return tuple(found[: self._options.most])

    def _of_pairs(self, key: str) -> list[Frame]:
        """Of all clips that are paired with `key` and can be used. Raises what is wrong with the first if none can."""
        found, reasons = [], []
        for other, subjects in self._pairs.of(key).items():
            try:
                found += self._paired(other, subjects)
            except Rejected as reason:
                reasons.append(reason)
            except _MALFORMED as error:
                reasons.append(_damaged(other, error))
            if len(found) >= self._options.most:
                break
        if reasons and not found:
            raise reasons[0]
        return found

    def _paired(self, key: str, subjects: tuple[Subject, ...]) -> list[Frame]:
        """Views of these subjects of the clip `key`."""
        if key not in self._by_key:
            raise Rejected("no subject", f"the paired clip {key} is in none of the parts")
        place = self._by_key[key]
        record = self._parts[place[0]][place[1]]
        numbers = [subject.numbers(record["annotation"]["mask_map"]) for subject in subjects]
        sure = {found[0] for found in numbers if len(found) == 1}  # of two of one name it may be either
        if not sure:
            names = ", ".join(str(subject.name) for subject in subjects)
            raise Rejected("no subject", f"the paired clip {key} has not one subject each of the name {names}")
        return list(self._subjects(place, record, only=sure))

    def _subjects(self, place: tuple[int, int], record: dict, *, only: Set[str] | None = None) -> Iterator[Frame]:
        """Views of the subjects in a record's annotated frame, in its order; or of some, by number."""
        annotation, crop = record["annotation"], _crop(record["metadata"])
        left, top = (0, 0) if crop is None else crop[:2]
        frame = _whole(annotation["ann_frame_data"]["ann_frame_idx"])
        background = set((record.get("word_tags") or {}).get("background") or ())
        video, taken = self._video(place, record["metadata"]), []
        for number, packed in annotation["mask_annotation"][str(frame)].items():
            name = annotation["mask_map"][number]["class_name"]
            wanted = name in self._options.classes if self._options.classes else name not in background
            if not wanted or (only is not None and number not in only):
                continue
            counts = packed["counts"] if isinstance(packed["counts"], str) else tuple(packed["counts"])
            height, width = map(int, _numbers(packed["size"], 2, "the size of a mask"))
            mask = Mask(height, width, counts, left=left, top=top)
            try:
                region = mask.decode()
            except ValueError as error:
                raise Rejected("damaged mask", f"{self._key(place)}, subject {number}: {error}") from error
            if region.mean() < max(self._options.minimum_area, 1 / region.size):
                continue
            if any(_overlap(region, other) > self._options.maximum_overlap for other in taken):
                continue
            taken.append(region)
            box = _extent(region) if self._options.masked else _bounding(annotation, number)
            box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
            yield Frame(video, frame, box, mask if self._options.masked else None)


_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)


def _damaged(key: str, error: Exception) -> Rejected:
    """What one of _MALFORMED says of a record, in words; ValueErrors are raised here, and have them."""
    words = str(error) if isinstance(error, ValueError) else "a field is of another kind than the set's"
    if isinstance(error, KeyError):
        words = f"it has no {error.args[0]!r}"
    return Rejected("damaged record", f"{key}: {words}")


def _cut(metadata: dict) -> tuple[int, int | None]:
    """First frame and the one behind the last. Raises ValueError."""
    cut = next((metadata[name] for name in _CUTS if metadata.get(name)), None)
    if cut is None:
        return 0, None
    if not isinstance(cut, list) or len(cut) != 2:
        raise ValueError(f"the clip is {reprlib.repr(cut)}, expected the numbers of 2 frames")
    start, end = map(_whole, cut)
    if start >= end:
        raise ValueError(f"frames {start} to {end} are no clip")
    return start, end


def _whole(number) -> int:
    """The number of a frame, which JSON may write as 5 or 5.0. Raises ValueError."""
    if not _is_number(number) or number != int(number) or number < 0:
        raise ValueError(f"{number!r} is no number of a frame")
    return int(number)


def _numbers(values, count: int, what: str) -> list[int | float]:
    if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
        raise ValueError(f"{what} is {reprlib.repr(values)}, expected {count} numbers")
    return values


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _crop(metadata: dict) -> tuple[int, int, int, int] | None:
    """From x0, x1, y0, y1 to left, top, right, bottom."""
    if not metadata.get("crop"):
        return None
    x0, x1, y0, y1 = map(int, _numbers(metadata["crop"], 4, "crop"))
    return x0, y0, x1, y1


def _bounding(annotation: dict, number: str) -> tuple[int, int, int, int]:
    """The detector's box, x0, y0, x1, y1 in fractions of pixels; masks are numbered from 1, boxes are in that order."""
    boxes = annotation["ann_frame_data"]["annotations"]
    if not (number.isdecimal() and 0 < int(number) <= len(boxes)):
        raise ValueError(f"subject {number} has no bounding box")
    x0, y0, x1, y1 = _numbers(boxes[int(number) - 1]["bbox"], 4, "bbox")
    return math.floor(max(0, x0)), math.floor(max(0, y0)), math.ceil(x1), math.ceil(y1)


def _extent(region: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return (one & other).sum() / (one | other).sum()


def _parts_of(path: Path, pairs: Path | None) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"OpenS2V {path} does not exist; give a json file or the folder of them")
    files = [file for file in sorted(path.glob("*.json")) if pairs is None or file.resolve() != pairs.resolve()]
    if not files:
        raise UserError(f"OpenS2V {path} holds no .json file; give a json file or the folder of them")
    return files
