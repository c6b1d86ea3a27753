"""Items of one key: the first that can be used counts, whoever reads it and in whatever order."""

from collections.abc import Callable, Sequence


class Duplicates:
    """Which items have the key of an earlier one. `usable(index)` reads an item; each is asked for once at most."""

    def __init__(self, keys: Sequence[str], usable: Callable[[int], bool]):
        self._usable, self._known = usable, {}
        first: dict[str, int] = {}
        self._same: dict[int, list[int]] = {}  # all items of a key that several have, by each of them
        for index, key in enumerate(keys):
            if first.setdefault(key, index) != index:
                same = self._same.setdefault(first[key], [first[key]])
                same.append(index)
                self._same[index] = same

    def earlier(self, index: int) -> int | None:
        """The item that has the key of `index`, comes before it and counts; None where `index` may count itself."""
        for other in self._same.get(index, ()):
            if other == index:
                return None
            if other not in self._known:
                self._known[other] = self._usable(other)
            if self._known[other]:
                return other
        return None
