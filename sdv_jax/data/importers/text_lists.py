"""prompts.txt and videos.txt, line by line (CogVideo, diffusers, finetrainers); images.txt: references or targets."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdv_jax.data.importers.item import Item, Picture, Rejected
from sdv_jax.data.importers.reading import (
    caption,
    check_folder,
    checked,
    file_inside,
    kind_of,
    path_key,
    read_lines,
    target,
)
from sdv_jax.errors import UserError

PROMPTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
VIDEOS = ("videos.txt", "video.txt")
IMAGES = ("images.txt", "image.txt")


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      prompts, videos, images: names of the files; "" means the usual ones. Without a list of videos the images are
        the targets, with one they are references.
      media: the folder that the paths in the lists are relative to; "" means the folder of the lists.
    """

    prompts: str = ""
    videos: str = ""
    images: str = ""
    media: str = ""


class Importer:
    """One item for each line."""

    def __init__(self, path: Path, options: Options):
        check_folder(path, what="folder of text lists")
        self._media = check_folder(Path(options.media), what="option media") if options.media else path
        prompts = _named(path, options.prompts, PROMPTS)
        videos, images = _named(path, options.videos, VIDEOS), _named(path, options.images, IMAGES)
        if prompts is None:
            raise UserError(f"folder {path} has none of {', '.join(PROMPTS)}; add one line of text for each video")
        if videos is None and images is None:
            raise UserError(f"folder {path} has none of {', '.join(VIDEOS + IMAGES)}; add one line for each prompt")
        self._list = videos or images
        files = [prompts, *(file for file in (videos, images) if file)]
        self._prompts, self._targets, *rest = _equally_long(files)
        self._images = rest[0] if rest else None
        if not self._targets:
            raise UserError(f"{self._list} is empty; add the paths of the files")
        self.about = {"lines": len(self._targets), "chosen": len(self._targets)}

    def __len__(self) -> int:
        return len(self._targets)

    def key(self, index: int) -> str:
        line = self._targets[index].strip()
        return path_key(self._media, line) if line else f"line/{index + 1}"

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where, name = f"{self._list} line {index + 1}", self._targets[index].strip()
        if not name:
            raise Rejected("no file", f"{where} is empty")
        file = file_inside(self._media, name, where=where)
        return checked(
            Item(
                key=self.key(index), caption=caption(self._prompts[index], where=where), target=target(file),
                views=partial(self._references, index, where),
                provenance={"set": self._list.parent.name, "file": name},
            )
        )  # fmt: skip

    def _references(self, index: int, where: str) -> tuple[Picture, ...]:
        if self._images is None:
            return ()
        image = file_inside(self._media, self._images[index].strip(), where=f"{where} image")
        if kind_of(image) == "video":
            raise Rejected("unknown file type", f"{image} is given as an image and is a video by its name")
        return (Picture(image),)


def _equally_long(files: list[Path]) -> list[list[str]]:
    """The lines of the lists. Empty ones at the end count where another list goes on. Raises UserError."""
    lists = [read_lines(file, what="list") for file in files]
    count = max((number for lines in lists for number, line in enumerate(lines, 1) if line.strip()), default=0)
    lists = [lines[:count] for lines in lists]
    for file, lines in zip(files[1:], lists[1:], strict=True):
        if len(lines) != len(lists[0]):
            raise UserError(
                f"{files[0]} has {len(lists[0])} lines and {file} has {len(lines)}; line n of one belongs to line n of "
                "the other: make them equally long"
            )
    return lists


def _named(folder: Path, name: str, usual: tuple[str, ...]) -> Path | None:
    """The file `name`, which must exist, or the first of the usual ones that does."""
    if name:
        if not (folder / name).is_file():
            raise UserError(f"list {folder / name} does not exist; check the path")
        return folder / name
    return next((folder / each for each in usual if (folder / each).is_file()), None)
