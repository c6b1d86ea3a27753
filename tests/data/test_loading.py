import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdv_jax.data import loading, records
from sdv_jax.data.loading import Mixture, Part, StepBatches, Stream
from sdv_jax.errors import UserError
from tests.train import tiny


def _parts(**counts):
    """One part per name, of so many rows whose `mean` is the number of the row."""
    found = []
    for name, count in counts.items():
        dataset = tiny.dataset(count, frames=1, views=1)
        numbered = np.arange(count, dtype=np.float32)[:, None, None, None, None] + np.zeros_like(dataset.mean)
        found.append(Part(dataclasses.replace(dataset, mean=numbered), np.arange(count), 1.0, name, ""))
    return tuple(found)


def _rows(batch):
    return batch["mean"][:, 0, 0, 0, 0].astype(int).tolist()


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (3, 8), (1, 2)])
def test_every_epoch_shows_every_row_once(count, size):
    batches = -(-4 * count // size)
    rows = np.concatenate([loading.row_order(count, size, i, (0, 1)) for i in range(batches)])
    for epoch in range(3):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_order_is_a_function_of_seed_and_position():
    order = loading.row_order(100, 8, 5, (0, 1))
    np.testing.assert_array_equal(order, loading.row_order(100, 8, 5, (0, 1)))
    assert not np.array_equal(order, loading.row_order(100, 8, 5, (1, 1)))
    assert not np.array_equal(order, loading.row_order(100, 8, 5, (0, 0)))
    epochs = [loading.row_order(100, 100, i, (0, 1)) for i in range(2)]
    assert not np.array_equal(*epochs)


def test_iterating_from_a_step_gives_what_that_step_reads():
    stream = Stream.of(_parts(a=7), 3, (0, 0), batches=6)
    batches = StepBatches({"motion": stream}, [{"motion": i} for i in range(6)], {"motion": np.arange(3)})
    iterator = loading.iterate(batches, 2, lambda batch: batch)
    for step in range(2, 6):
        assert _rows(next(iterator)["motion"]) == _rows(stream.batch(step, np.arange(3)))
    with pytest.raises(StopIteration):
        next(iterator)
    iterator.close()


def test_worker_processes_read_the_same(tmp_path):
    records.save(tmp_path / "set", tiny.dataset(7, frames=1, views=1))
    stream = Stream.of(Mixture.of(records.load(tmp_path / "set"), "set").parts(), 3, (0, 0), batches=5)
    batches = StepBatches({"motion": stream}, [{"motion": i} for i in range(5)], {"motion": np.arange(3)})
    found = []
    for workers in (0, 2):
        iterator = loading.iterate(batches, 1, lambda batch: batch, workers=workers)
        found.append([next(iterator)["motion"]["mean"] for _ in range(4)])
        iterator.close()
    np.testing.assert_array_equal(*found)


def test_workers_leave_signals_to_the_parent_and_a_killed_one_is_one_line(tmp_path):
    records.save(tmp_path / "set", tiny.dataset(7, frames=1, views=1))
    stream = Stream.of(Mixture.of(records.load(tmp_path / "set"), "set").parts(), 3, (0, 0), batches=40)
    batches = StepBatches({"motion": stream}, [{"motion": i} for i in range(40)], {"motion": np.arange(3)})
    iterator = loading.iterate(batches, 0, lambda batch: batch, workers=1)
    next(iterator)
    (worker,) = [child for child in multiprocessing.active_children() if "prefetch" in child.name]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for _ in range(20):  # more than are ready
        next(iterator)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a data worker was killed.*lower data.workers") as error:
        list(iterator)
    assert "\n" not in str(error.value)
    iterator.close()


KILLED = """
import os, signal, sys
import numpy as np
from sdv_jax.data import loading, records
from sdv_jax.data.loading import Mixture, StepBatches, Stream

if __name__ == "__main__":
    stream = Stream.of(Mixture.of(records.load(sys.argv[1]), "set").parts(), 3, (0, 0), batches=4000)
    batches = StepBatches({"motion": stream}, [{"motion": i} for i in range(4000)], {"motion": np.arange(3)})
    iterator = loading.iterate(batches, 0, lambda batch: batch, workers=1)
    next(iterator)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    records.save(tmp_path / "set", tiny.dataset(7, frames=1, views=1))
    (tmp_path / "killed.py").write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "set")]
    # the pipe ends with the last process that holds it, which is the worker
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == -signal.SIGKILL


def test_processes_read_disjoint_rows_of_the_same_batches():
    stream = Stream.of(_parts(a=24), 8, (3, 1), batches=3)
    whole = [_rows(stream.batch(i, np.arange(8))) for i in range(3)]
    halves = [[_rows(stream.batch(i, mine)) for i in range(3)] for mine in (np.arange(4), np.arange(4, 8))]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert sorted(sum(whole, [])) == list(range(24))  # an epoch: nothing twice, nothing left out


def test_a_mixture_comes_in_its_shares_and_each_part_in_its_own_epochs():
    parts = tuple(dataclasses.replace(part, weight=w) for part, w in zip(_parts(a=8, b=12), (3.0, 1.0), strict=True))
    stream = Stream.of(parts, 4, (0, 0), batches=400)
    assert abs((stream.choice == 0).mean() - 0.75) < 0.08
    for index, count in ((0, 8), (1, 12)):
        numbers = np.flatnonzero(stream.choice == index)[: count // 4]
        assert sorted(sum((_rows(stream.batch(int(n), np.arange(4))) for n in numbers), [])) == list(range(count))


def test_buckets_of_a_set_share_by_their_rows():
    small, large = tiny.dataset(5, frames=1, views=1), tiny.dataset(15, frames=2, views=1)

    class Two:
        buckets, scale, empty_text, fingerprint = (small, large), small.scale, small.empty_text, "x"

    mixture = Mixture({"two": Two(), "one": small}, {"two": 2.0, "one": 1.0})
    assert [part.weight for part in mixture.parts()] == [0.5, 1.5, 1.0]
    stream = Stream.of(mixture.parts(), 2, (0, 0), batches=40)
    frames = {stream.batch(i, np.arange(2))["mean"].shape[1] for i in range(40)}
    assert frames == {1, 2}  # a batch is of one shape


def test_what_is_held_out_is_never_trained_on_and_does_not_depend_on_a_seed():
    train, held = loading.hold_out(50, 10)
    assert sorted([*train, *held]) == list(range(50)) and len(held) == 10
    np.testing.assert_array_equal(held, loading.hold_out(50, 10)[1])
    part = dataclasses.replace(_parts(a=50)[0], indices=train)
    stream = Stream.of([part], 8, (1, 0), batches=20)
    seen = {row for i in range(20) for row in _rows(stream.batch(i, np.arange(8)))}
    assert seen == set(train.tolist())


def test_a_batch_can_be_traced_back_to_its_examples():
    stream = Stream.of(_parts(a=7), 3, (0, 0), batches=2)
    batches = StepBatches({"motion": stream}, [{"motion": 1}], {"motion": np.arange(1)})
    told = batches.describe(0)["motion"]
    assert [row["row"] for row in told] == _rows(stream.batch(1, np.arange(3)))
    assert told[0] == {"set": "a", "bucket": "1x4x4", "row": told[0]["row"], "key": str(told[0]["row"]),
                       "caption": f"caption {told[0]['row']}"}  # fmt: skip
