"""Writing files so that a reader never sees half of one."""

import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from sdv_jax.errors import NotWritten, UserError

_LONGEST_NAME = 255  # bytes, of every common file system


def check_writable(path: str | os.PathLike, *, what: str) -> pathlib.Path:
    """`path` as a Path after checking that a file could be written there; called before minutes of work are spent.

    Raises UserError when the folder is missing or read-only, or when `path` itself is a folder.
    """
    path = pathlib.Path(path)
    folder = path.parent
    if not folder.exists():
        raise UserError(f"{what} {path}: the folder {folder} does not exist; create it or choose another place")
    if not folder.is_dir():
        raise UserError(f"{what} {path}: {folder} is a file, not a folder; choose another place")
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder; give the name of a file in it")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise UserError(f"{what} {path}: the name is longer than {_LONGEST_NAME} bytes; choose a shorter one")
    if not _accepts_files(folder):
        raise UserError(f"{what} {path}: no permission to write in {folder}; choose another place")
    return path


def make_folder(path: str | os.PathLike, *, what: str) -> pathlib.Path:
    """`path` as a Path, after making the folder and those above it where they are missing.

    Raises UserError where that fails, or where the folder takes no files.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{what} {path} is a file; choose another place") from error
    except OSError as error:
        raise UserError(f"{what} {path} cannot be made ({error.strerror}); choose another place") from error
    if not _accepts_files(path):
        raise UserError(f"{what} {path}: no permission to write there; choose another place")
    return path


@contextmanager
def replacing(path: str | os.PathLike, *, what: str) -> Iterator[pathlib.Path]:
    """A temporary file beside `path`, with the same suffix, that becomes `path` when the block ends without an error.

    On an error the temporary file is removed and an older file at `path` stays as it was. An OSError (disk full, no
    permission) becomes a NotWritten. The contents are on the disk before the name is: a host that goes down leaves the
    old file or the new one.
    """
    path = check_writable(path, what=what)
    try:
        handle, name = tempfile.mkstemp(prefix=".writing.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise NotWritten(f"{what} {path} cannot be written: {error.strerror}") from error
    try:
        yield pathlib.Path(name)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes private files; this one replaces an ordinary one
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        raise NotWritten(f"{what} {path} cannot be written: {error.strerror or error}") from error
    finally:
        pathlib.Path(name).unlink(missing_ok=True)


def _accepts_files(folder: pathlib.Path) -> bool:
    """Whether a file can be made in `folder`: tried, because permission bits do not tell about read-only mounts."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
