"""Checkpoints of a run, by orbax, written in the background: everything a step changes, and what the run is."""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sdv_jax.errors import NotWritten, UserError, one_line
from sdv_jax.train.state import TrainState, Tree

_ITEMS = ("state", "run")


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run starts from, and must still start from when it goes on: its key, and a sum over the frozen weights."""

    key: list[int]
    base: int

    @classmethod
    def of(cls, key: jax.Array, frozen: Tree) -> "Origin":
        return cls(np.asarray(jax.random.key_data(key)).tolist(), sum(checksums(frozen)) % 2**32)


class Checkpoints:
    """The checkpoints of one run, named by the number of steps done: the newest `keep`, and every `keep_every`-th step.

    A checkpoint is there completely or not at all, whatever interrupts its writing. All processes call every method.
    `save` and `close` raise NotWritten when one cannot be written; those before it stay. With `reading` nothing in the
    folder is made, removed or renamed: the run may be at work.
    """

    def __init__(self, folder: Path, origin: Origin, *, keep: int = 1, keep_every: int = 0, reading: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if reading else keep, keep_period=keep_every or None, create=not reading,
            cleanup_tmp_directories=not reading,
        )  # fmt: skip
        self.folder, self.origin, self.reading = folder, origin, reading
        self.manager = ocp.CheckpointManager(folder.resolve(), options=options, item_names=_ITEMS)

    def save(self, step: int, state: TrainState, *, data: Mapping[str, object], config: Mapping[str, object]) -> None:
        """Begins to write a checkpoint after `step` steps, once; waits only for the one before.

        `data` is the position in the data, see `Plan.data_state`.
        """
        if step in self.manager.all_steps():
            return
        # A copy, because the next step donates the buffers that the writing thread would still be reading.
        kept = jax.tree.map(jnp.copy, state._asdict())
        run = {"key": self.origin.key, "base": self.origin.base, "sums": checksums(kept)}
        run |= {"data": dict(data), "config": dict(config)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(kept), run=ocp.args.JsonSave(run))
        with self._writing():
            self.manager.save(step, args=items)

    def restore(self, like: TrainState, *, data: Mapping[str, object]) -> tuple[int, TrainState] | None:
        """(steps done, state) of the newest checkpoint that can be read, in the shapes, dtypes and shardings of `like`;
        None where there is no checkpoint.

        One that cannot be read, or whose numbers are not those that were written, is told on stderr and, but for
        `reading`, put aside as `damaged-N`. Raises UserError where none can be read, for a run from another origin, and
        for data that are not those the run has read.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        for step in steps:
            try:
                run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
                run = {name: run[name] for name in ("key", "base", "sums", "data")}
                self._check(step, run, data)
                state = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                found = self.manager.restore(step, args=state)["state"]
                if checksums(found) != run["sums"]:
                    raise ValueError("its numbers are not those that were written")
            except (UserError, jax.errors.JaxRuntimeError):  # the latter of devices, or of a process that died
                raise
            except Exception as error:  # whatever a damaged file makes orbax and tensorstore raise
                if "RESOURCE_EXHAUSTED" in str(error):  # no memory says nothing of the file
                    raise
                self.manager.reload()
                if self.reading and max(self.manager.all_steps(), default=0) > steps[0]:  # then the older ones go
                    return self.restore(like, data=data)
                self._pass_over(step, error, last=step == steps[-1])
                continue
            return step, TrainState(**found)
        return None

    def close(self) -> None:
        """Waits for what is being written."""
        with self._writing():
            self.manager.close()

    def _check(self, step: int, run: Mapping, data: Mapping[str, object]) -> None:
        where = self.folder / str(step)
        if run["key"] != self.origin.key:
            raise UserError(f"checkpoint {where} was made with another train.seed; use a new workdir")
        if run["base"] != self.origin.base:
            raise UserError(
                f"checkpoint {where} was trained on other base weights: those in model.path have changed since; "
                "restore them, or use a new workdir"
            )
        _check_data(where, run["data"], data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # of the thread that wrote the one before, too
            raise NotWritten(
                f"a checkpoint in {self.folder} cannot be written ({one_line(error)}); make room or check the place: "
                "the same command goes on from the newest checkpoint there is"
            ) from error

    def _pass_over(self, step: int, error: Exception, *, last: bool) -> None:
        where = self.folder / str(step)
        if last:
            raise UserError(
                f"checkpoint {where} cannot be read ({one_line(error)}), and there is no older one; use a new workdir"
            ) from error
        if jax.process_index() == 0:
            told = f"sdv: checkpoint {where} cannot be read ({one_line(error)}); going on from the one before it"
            print(told, file=sys.stderr)
        if self.reading:
            return
        if jax.process_index() == 0:
            names = (f"damaged-{step}{again}" for again in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
            where.rename(next(place for name in names if not (place := self.folder / name).exists()))
        self.manager.reload()


def checksums(tree: Tree) -> list[int]:
    """A number per leaf, the sum of its bits as 32-bit integers: the same however the leaf is spread over devices."""
    return [int(number) for number in jax.device_get(_sums(jax.tree.leaves(tree)))]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def words(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)

    return [jnp.sum(words(leaf), dtype=jnp.uint32) for leaf in leaves]


def _check_data(where: Path, before: Mapping, now: Mapping) -> None:
    """`sets` are fingerprints and shares of the data of each stream, which a run must not change under itself."""
    changed = [name for name, sets in before.get("sets", {}).items() if now["sets"].get(name, sets) != sets]
    if changed:
        raise UserError(
            f"checkpoint {where} was trained on other data: data.{changed[0]} has changed since, in its content or its "
            "shares; restore it, or use a new workdir"
        )
