"""The exceptions that mean "the input is wrong", as opposed to "the program is wrong", and "the disk is"."""

import errno

_OF_THE_MACHINE = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EIO)


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a shape, a prompt.

    The message is one line that says what is wrong, where, what was expected and found, and what to do. The command
    line prints it after `sdv: error:` and exits with status 2; library callers catch it as a `ValueError`.
    """


class NotWritten(UserError):
    """A file that the disk did not take: full, over a quota, silent. With room the same command goes on."""


def of_a_file(error: OSError) -> str:
    """What the operating system said, and of which file."""
    return f"{error.filename or 'a file'}: {error.strerror or error}"


def one_line(error: BaseException, *, typed: bool = False) -> str:
    """What another library said, its first line, at most 200 characters; its type where it said nothing.

    With `typed` the type comes first: for errors that nothing foresees, which may say as little as a missing key.
    """
    said = (str(error).strip().splitlines() or [""])[0]
    name = type(error).__name__
    return (f"{name}: {said}" if typed else said or name)[:200]


def of_the_machine(error: BaseException) -> bool:
    """Whether an error of the operating system says nothing of the file at hand: any other would fail alike.

    A full disk, too many open files, a device that does not answer.
    """
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE
