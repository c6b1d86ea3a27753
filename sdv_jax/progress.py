"""Bars on stderr for the stages of a call: what is being done, how far it is, how long it took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_BAR = "{desc:<22} |{bar:24}| {n_fmt:>3}/{total_fmt:<3}"
_NO_BAR = "{desc:<22}"


class Progress:
    """Named stages. `shown=False` prints nothing; `seconds` (stage -> seconds spent in it) is filled either way."""

    def __init__(self, *, shown: bool = True):
        self.shown = shown
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, total: int | None = None) -> Iterator[Callable[[], None]]:
        """One stage; yields what to call after each of its `total` steps. Without `total` it only tells its time."""
        start = time.perf_counter()
        form = _BAR if total else _NO_BAR
        running = form + (" {elapsed}<{remaining}" if total else " ...")
        bar = tqdm(total=total, desc=name, bar_format=running, disable=not self.shown)
        try:
            yield bar.update
        except BaseException:
            bar.leave = False
            raise
        else:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            bar.bar_format = f"{form} {spent:.1f} s"
            bar.refresh()
        finally:
            bar.close()
