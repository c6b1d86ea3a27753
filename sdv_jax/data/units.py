"""Units of work of a preparation: what each left behind, told in DIR/shards/NNNNN.json once it is finished."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdv_jax.data import records
from sdv_jax.data.files import replacing
from sdv_jax.data.manifest import Shard, write_json
from sdv_jax.errors import UserError, one_line

FOLDER = "shards"
REJECTED_FILE = "rejected.jsonl"


@dataclasses.dataclass(frozen=True)
class RejectedItem:
    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A sample on the page; `file` and `views` are in DIR/thumbnails, `views` is empty where it has none."""

    key: str
    caption: str
    bucket: str
    seconds: float
    file: str
    views: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """A finished unit.

    Attributes:
      number: which one.
      settings: a digest of what decides its contents.
      items: how many were read of the source.
      keys: of the records, per bucket, in their order.
      shards: of the buckets that got a record.
      durations: of the source clips, in seconds.
      used: seconds of them that records show.
      empty_text: SHA-256 of the empty prompt's file.
      cut_captions: how many were longer than the text length.
      seconds: how long it took.
      left_out: other views that could not be read, of items that had more; each with its item's key.
    """

    number: int
    settings: str
    items: int
    keys: Mapping[str, tuple[str, ...]]
    shards: Mapping[str, Shard]
    rejected: tuple[RejectedItem, ...]
    thumbnails: tuple[Thumbnail, ...]
    durations: tuple[float, ...]
    used: float
    empty_text: str
    cut_captions: int
    seconds: float
    left_out: tuple[RejectedItem, ...] = ()


def write(folder: Path, unit: Unit) -> None:
    """Says that a unit is finished: its records and thumbnails are on the disk before."""
    write_json(_file(folder, unit.number), dataclasses.asdict(unit), what="unit of work")


def read(folder: Path, number: int, *, units: int, settings: str) -> Unit | None:
    """A finished unit; None where it is not finished, or where its records are not all there any more.

    Raises UserError for a file that is damaged or was written with other settings.
    """
    path = _file(folder, number)
    try:
        told = json.loads(path.read_text("utf-8"))
        unit = Unit(
            number=int(told["number"]),
            settings=str(told["settings"]),
            items=int(told["items"]),
            keys={name: tuple(keys) for name, keys in told["keys"].items()},
            shards={name: Shard(**shard) for name, shard in told["shards"].items()},
            rejected=tuple(RejectedItem(**item) for item in told["rejected"]),
            thumbnails=tuple(Thumbnail(**item) for item in told["thumbnails"]),
            durations=tuple(map(float, told["durations"])),
            used=float(told["used"]),
            empty_text=str(told["empty_text"]),
            cut_captions=int(told["cut_captions"]),
            seconds=float(told["seconds"]),
            left_out=tuple(RejectedItem(**item) for item in told.get("left_out", ())),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error, typed=True)}); remove it, and the same command does that part again"
        ) from error
    if unit.number != number or unit.settings != settings:
        raise UserError(f"{path} was made with other settings or of other data; remove it, or use another output.path")
    there = all(records.is_there(folder, name, shard, units) for name, shard in unit.shards.items())
    return unit if there else None


def is_whole(folder: Path, unit: Unit, *, units: int) -> bool:
    """Whether the records of a finished unit are what was written; reads all of them."""
    return all(records.is_whole(folder, name, shard, units) for name, shard in unit.shards.items())


def reasons(items: Iterable[RejectedItem]) -> dict[str, int]:
    """How many there are of each reason, the most frequent first."""
    return dict(Counter(item.reason for item in items).most_common())


def write_rejected(folder: Path, units: Iterable[Unit]) -> None:
    """Writes DIR/rejected.jsonl: a line for every item set aside, with its reason."""
    with replacing(folder / REJECTED_FILE, what="list of rejected items") as temporary:
        lines = [json.dumps(dataclasses.asdict(item), ensure_ascii=False) for unit in units for item in unit.rejected]
        temporary.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _file(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:05d}.json"
