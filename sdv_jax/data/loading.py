"""What a training step reads: rows of prepared data, in an order that is a pure function of (seed, step).

A *stream* serves one task with global batches: of one dataset or a mixture of several, each in buckets of one shape.
Every process computes the same order and reads only its own rows of each batch, so the batches of a run do not depend
on the number of hosts, of workers or of interruptions, and the position in the data is the number of steps done.
"""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import grain
import numpy as np
from absl import flags

from sdv_jax.errors import UserError
from sdv_jax.models.contract import LatentScale

_HELD_OUT = 0x5D0  # part of the seed of what is held out, the same in every run
_MIXTURE = 0x313  # part of the seed of the order in which parts of a mixture come
_AHEAD = 2  # batches kept ready, on the host and on the device


class Rows(Protocol):
    """Examples of one shape: a bucket of a prepared dataset, or arrays in memory.

    `shapes` are those of each array of an example; `has_token_ids` says that its text is to be encoded in the step.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    has_token_ids: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of one example, see `sdv_jax.data.latents`."""

    def describe(self, index: int) -> dict[str, str]:
        """Which example it is: its key and its caption."""


class Dataset(Protocol):
    """A prepared dataset: `records.Prepared`, or one in memory."""

    scale: LatentScale
    empty_text: np.ndarray
    buckets: tuple[Rows, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What one task reads: datasets by name, each with its share of the batches; itself a dataset.

    Within a dataset a bucket's share is that of its rows. Shares need not sum to one.
    """

    sets: Mapping[str, Dataset]
    shares: Mapping[str, float]

    @classmethod
    def of(cls, dataset: "Dataset | Mixture", name: str) -> "Mixture":
        """One dataset alone, or a mixture as it is."""
        return dataset if isinstance(dataset, Mixture) else cls({name: dataset}, {name: 1.0})

    @property
    def scale(self) -> LatentScale:
        return next(iter(self.sets.values())).scale

    @property
    def empty_text(self) -> np.ndarray:
        return next(iter(self.sets.values())).empty_text

    @property
    def buckets(self) -> tuple[Rows, ...]:
        return tuple(bucket for dataset in self.sets.values() for bucket in dataset.buckets)

    @property
    def fingerprint(self) -> str:
        return "+".join(dataset.fingerprint for dataset in self.sets.values())

    def parts(self) -> "tuple[Part, ...]":
        """Every row of every bucket."""
        found = []
        for name, dataset in self.sets.items():
            rows = sum(map(len, dataset.buckets))
            found += [
                Part(bucket, np.arange(len(bucket)), self.shares[name] * len(bucket) / rows, name, dataset.fingerprint)
                for bucket in dataset.buckets
            ]
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of one bucket that a stream may read, and how often its batches come beside those of other parts.

    `name` and `fingerprint` are the dataset's.
    """

    rows: Rows
    indices: np.ndarray
    weight: float
    name: str
    fingerprint: str


def hold_out(count: int, held: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, `held` rows kept out): a random choice that no seed of a run changes."""
    order = _order(count, (_HELD_OUT,))
    return np.sort(order[held:]), np.sort(order[:held])


def row_order(count: int, batch_size: int, position: int, seed: tuple[int, ...]) -> np.ndarray:
    """Rows of the `position`-th batch of an endless stream: epoch after epoch, each shuffled on its own.

    A pure function of its arguments, so that a resumed run continues in the middle of an epoch without any stored
    state.
    """
    first = position * batch_size
    rows = np.arange(first, first + batch_size)
    epochs = rows // count
    return np.concatenate([_order(count, (*seed, int(e)))[rows[epochs == e] % count] for e in np.unique(epochs)])


@functools.lru_cache(maxsize=16)
def _order(count: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed))).permutation(count)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Global batches of one task. `seed` is (run seed, stream number): streams of one run are shuffled differently.

    Batch number i is of part `choice[i]`, drawn by the parts' weights, and is the `position[i]`-th of that part.
    """

    parts: tuple[Part, ...]
    batch_size: int
    seed: tuple[int, ...]
    choice: np.ndarray
    position: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[Part], batch_size: int, seed: tuple[int, ...], *, batches: int) -> "Stream":
        """The first `batches` batches."""
        weights = np.array([part.weight for part in parts], float)
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((*seed, _MIXTURE)))).random(batches)
        choice = np.minimum(np.searchsorted(np.cumsum(weights) / weights.sum(), draws, side="right"), len(parts) - 1)
        position = np.zeros(batches, int)
        for number in range(len(parts)):
            mine = choice == number
            position[mine] = np.arange(mine.sum())
        return cls(tuple(parts), batch_size, seed, choice, position)

    def where(self, number: int) -> tuple[Part, np.ndarray]:
        """The part that batch `number` is of, and its rows there."""
        index = int(self.choice[number])
        part = self.parts[index]
        seed = (*self.seed, index) if len(self.parts) > 1 else self.seed
        return part, part.indices[row_order(len(part.indices), self.batch_size, int(self.position[number]), seed)]

    def batch(self, number: int, mine: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `mine` of batch `number`, stacked: arrays with a leading axis."""
        part, indices = self.where(number)
        return stack([part.rows[int(index)] for index in indices[mine]])


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of one shape as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class StepBatches:
    """Random access from a training step to its batch: `plan[step]` maps stream names to batch numbers.

    `mine` says which rows of a stream's batches this process reads.
    """

    streams: Mapping[str, Stream]
    plan: Sequence[Mapping[str, int]]
    mine: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        return {
            name: self.streams[name].batch(number, self.mine[name])
            for name, number in self.plan[int(step)].items()
        }

    def describe(self, step: int) -> dict[str, list[dict[str, str]]]:
        """Which examples the step reads, on all hosts together."""
        found = {}
        for name, number in self.plan[step].items():
            part, indices = self.streams[name].where(number)
            where = {"set": part.name, "bucket": part.rows.name}
            found[name] = [where | {"row": int(i)} | part.rows.describe(int(i)) for i in indices]
        return found


def iterate(batches: StepBatches, start: int, place: Callable, *, workers: int = 0) -> Iterator:
    """`place(batch)` for every step from `start` on, made ahead of time. Close the iterator when done.

    Rows are read by a thread, or with `workers` by that many processes; `place`, which puts a batch on the devices,
    runs in a thread of this process. Raises UserError when a worker was killed.
    """
    options = grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=0 if workers else _AHEAD)
    dataset = grain.MapDataset.source(batches)[start:].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain asks absl's flags, which only absl's own programs parse
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=_belong_to_the_parent)
    dataset = dataset.map(place)
    return _Batches(iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=_AHEAD)))


class _Batches(Iterator):
    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches

    def __next__(self):
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # grain's words, behind which it has no type of its own
                raise
            raise UserError(
                "a data worker was killed, perhaps because memory ran out; lower data.workers (0 reads in a thread), "
                "and the same command goes on"
            ) from error

    def close(self) -> None:
        self._batches.close()


def _belong_to_the_parent(worker: int, workers: int) -> None:
    """Ctrl-C and a preemption may reach every process; the parent ends a run in order and stops its workers itself.
    When it is killed they end too: they would hold their memory for good.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
