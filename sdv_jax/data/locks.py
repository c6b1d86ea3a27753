"""Who is at work in a folder. The kernel ends a lock with its process, however that ends: none is left behind."""

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sdv_jax.errors import UserError

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)  # what file systems say that have none
_log = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, process: tuple[int, int]) -> Iterator[None]:
    """Holds the place of process I of N in `folder`, so that two processes never do one part of the work at once.

    On a file system without locks there is a note, and nothing is held.

    Raises:
      UserError: another process holds the place, or one of another N, whose parts are others; or no file can be made.
    """
    with ExitStack() as held:
        with _locking(folder, "output.path"):
            _claim(folder, process, held)
        yield


@contextmanager
def whole(folder: Path, *, key: str) -> Iterator[bool]:
    """Whether `folder` could be had by this process alone, which then holds it.

    On a file system without locks there is a note, and nothing is held.

    Raises:
      UserError: no file can be made; `key` is where another folder is named.
    """
    with ExitStack() as held:
        free = True
        with _locking(folder, key):
            free = _lock(folder / ".in-use", held)
        yield free


@contextmanager
def _locking(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"{folder} cannot be locked ({error.strerror}); choose another {key}") from error
        _log.warning("%s is on a file system without locks: start no process twice", folder)


def _claim(folder: Path, process: tuple[int, int], held: ExitStack) -> None:
    if not _lock(folder / f".process-{process[0]}-of-{process[1]}", held):
        raise UserError(
            f"{_taken(folder, process)}; wait for it, or give each process a place of its own with --process I/N"
        )
    for path in folder.glob(".process-*"):
        match = re.fullmatch(r"\.process-(\d+)-of-(\d+)", path.name)
        if match and int(match[2]) != process[1]:
            with ExitStack() as passing:  # to remove what a killed process left
                if not _lock(path, passing):
                    other = _taken(folder, (int(match[1]), int(match[2])))
                    raise UserError(f"{other}; wait for it, or start this one ({process[0]}/{process[1]}) with its N")


def _taken(folder: Path, place: tuple[int, int]) -> str:
    return f"{folder} is being prepared by another process ({place[0]}/{place[1]})"


def _lock(path: Path, held: ExitStack) -> bool:
    """Whether the lock of this name, a file that goes when `held` ends, could be had."""
    while True:
        with ExitStack() as opened:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                its_name = os.path.samestat(os.fstat(handle), os.stat(path))
            except BlockingIOError:
                return False
            except FileNotFoundError:
                its_name = False
            except OSError:
                path.unlink()
                raise
            if its_name:  # else the file was removed between opening and locking it
                held.push(opened.pop_all())
                held.callback(path.unlink, missing_ok=True)
                return True
