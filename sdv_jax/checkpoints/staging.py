"""Folders that appear complete or not at all: written under another name next to their place, then renamed."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdv_jax.errors import NotWritten, UserError

_SLACK = 64 * 2**20  # json files, tokenizer, file system overhead


def check_absent(destination: Path) -> Path:
    """`destination` as an absolute path. Raises UserError if something is there."""
    destination = destination.absolute()
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination}: exists already; remove it or choose another destination")
    return destination


@contextmanager
def staged(destination: Path, *, needed: int) -> Iterator[Path]:
    """Yields a new folder that becomes `destination` when the block ends without an error, and vanishes when it does
    not.

    What a killed process left behind is removed by the next one; while a process lives, nobody else can write here.
    Raises UserError if `destination` exists, NotWritten if its parent cannot be written or the disk has less than
    `needed` bytes free.
    """
    destination = check_absent(destination)
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise NotWritten(f"{destination.parent}: cannot write here ({error.strerror})") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{destination}: another process is writing it now") from None
        try:
            _empty(partial)
            free = shutil.disk_usage(destination.parent).free
            if free < needed + _SLACK:
                wanted = _gigabytes(needed + _SLACK)
                raise NotWritten(f"{destination.parent}: not enough disk: {wanted} needed, {_gigabytes(free)} free")
            yield partial
            os.sync()  # what the new name stands for must not be lost in a crash that the name survives
            os.rename(partial, destination)
        except OSError as error:
            raise NotWritten(f"{destination}: writing failed ({error.strerror or error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
