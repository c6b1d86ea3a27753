"""prompts.txt and videos.txt, line by line (CogVideo, diffusers, finetrainers); images.txt: references or targets."""

from dataclasses import dataclass
from pathlib import Path

from sdv_jax.data.importers.item import Item, Picture, Rejected
from sdv_jax.data.importers.reading import (
    caption,
    check_folder,
    checked,
    file_inside,
    kind_of,
    read_lines,
    repeated,
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
        self._prompts = read_lines(prompts, what="list")
        self._targets = read_lines(self._list, what="list")
        self._images = read_lines(images, what="list") if videos and images else None
        for name, lines in ((self._list, self._targets), (images, self._images)):
            if lines is not None and len(lines) != len(self._prompts):
                raise UserError(
                    f"{prompts} has {len(self._prompts)} lines and {name} has {len(lines)}; line n of one belongs to "
                    "line n of the other: make them equally long"
                )
        if not self._targets:
            raise UserError(f"{self._list} is empty; add the paths of the files")
        self._repeated = repeated(line.strip() for line in self._targets)
        self.about = {"lines": len(self._targets), "chosen": len(self._targets)}

    def __len__(self) -> int:
        return len(self._targets)

    def key(self, index: int) -> str:
        return self._targets[index].strip() or f"line/{index + 1}"

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        where = f"{self._list} line {index + 1}"
        if not self._targets[index].strip():
            raise Rejected("no file", f"{where} is empty")
        if index in self._repeated:
            raise Rejected("duplicate key", f"{where}: {self.key(index)} was there before")
        file = file_inside(self._media, self._targets[index], where=where)
        references = ()
        if self._images is not None:
            image = file_inside(self._media, self._images[index], where=f"{where} image")
            if kind_of(image) == "video":
                raise Rejected("unknown file type", f"{image} is given as an image and is a video by its name")
            references = (Picture(image),)
        return checked(
            Item(
                key=self.key(index), caption=caption(self._prompts[index], where=where), target=target(file),
                references=references, provenance={"set": self._list.parent.name, "file": self.key(index)},
            )
        )  # fmt: skip


def _named(folder: Path, name: str, usual: tuple[str, ...]) -> Path | None:
    """The file `name`, which must exist, or the first of the usual ones that does."""
    if name:
        if not (folder / name).is_file():
            raise UserError(f"list {folder / name} does not exist; check the path")
        return folder / name
    return next((folder / each for each in usual if (folder / each).is_file()), None)
