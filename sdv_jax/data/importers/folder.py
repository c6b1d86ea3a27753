"""A folder of clips or pictures, each with its caption in a .txt file of the same stem (musubi, diffusion-pipe)."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdv_jax.data.importers.item import Item, Picture, Rejected, plain
from sdv_jax.data.importers.reading import (
    check_folder,
    checked,
    file_inside,
    kind_of,
    read_caption_file,
    target,
    walk,
)
from sdv_jax.errors import UserError

KINDS = ("all", "video", "image")


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      kind: "video" or "image" takes only such files, "all" both.
      subjects: every folder holds pictures of one subject: each is a target, and the others of its folder are its
        references. Its caption may be for the whole folder, in caption.txt.
      references: a folder, relative to the set, of reference pictures: of clips/dog.mp4 these are
        REFERENCES/clips/dog.png and all pictures in REFERENCES/clips/dog/. "" means none.
    """

    kind: str = "all"
    subjects: bool = False
    references: str = ""


class Importer:
    """One item for each media file in the folder and below, in the order of their paths. Hidden files do not count."""

    def __init__(self, path: Path, options: Options):
        if options.kind not in KINDS:
            raise UserError(f"option kind is {options.kind!r}; choose one of: {', '.join(KINDS)}")
        if options.subjects and (options.references or options.kind == "video"):
            raise UserError("option subjects takes its references from pictures of the same folder; leave away "
                            "references and kind")  # fmt: skip
        self._root, self._options = check_folder(path, what="folder"), options
        kind = "image" if options.subjects else options.kind
        files = sorted(walk(self._root))
        apart = os.path.normpath(options.references) + os.sep if options.references else None
        if apart and not os.path.isdir(self._root / apart):
            raise UserError(f"folder {path} has no folder {options.references}; check the option references")
        self._pictures = [file for file in files if kind_of(Path(file)) == "image"]
        self._files = [
            file for file in files
            if kind_of(Path(file)) in (("video", "image") if kind == "all" else (kind,))
            and not (apart and file.startswith(apart))
        ]  # fmt: skip
        if not self._files:
            wanted = {"all": "video or picture", "video": "video", "image": "picture"}[kind]
            raise UserError(f"folder {path} holds no {wanted} among its {len(files)} files; give another folder")
        self._views = self._views_of()
        self.about = {"files": len(files), "chosen": len(self._files)}

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return plain(Path(self._files[index]).as_posix())

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = file_inside(self._root, self._files[index], where="folder")
        return checked(
            Item(
                key=self.key(index), caption=self._caption(file), target=target(file),
                views=partial(self._references, index, file),
                provenance={"set": str(self._root.name), "file": self.key(index)},
            )
        )  # fmt: skip

    def _references(self, index: int, file: Path) -> tuple[Picture, ...]:
        found = tuple(Picture(self._root / name) for name in self._views[index])
        if self._options.subjects and not found:
            raise Rejected("no other view", f"{file} is the only picture in its folder")
        if self._options.references and not found:
            raise Rejected("no reference", f"{file} has no picture in {self._options.references}")
        return found

    def _caption(self, file: Path) -> str:
        beside, shared = file.with_suffix(".txt"), file.parent / "caption.txt"
        return read_caption_file(shared if self._options.subjects and not beside.is_file() else beside)

    def _views_of(self) -> list[list[str]]:
        """For each file the reference pictures that belong to it."""
        if not self._options.subjects and not self._options.references:
            return [[]] * len(self._files)
        by_folder: dict[str, list[str]] = {}
        by_stem: dict[str, list[str]] = {}
        for picture in self._pictures:
            by_folder.setdefault(os.path.dirname(picture), []).append(picture)
            by_stem.setdefault(os.path.splitext(picture)[0], []).append(picture)
        if self._options.subjects:
            return [[view for view in by_folder[os.path.dirname(file)] if view != file] for file in self._files]
        stems = [os.path.normpath(os.path.join(self._options.references, os.path.splitext(f)[0])) for f in self._files]
        return [by_stem.get(stem, []) + by_folder.get(stem, []) for stem in stems]
