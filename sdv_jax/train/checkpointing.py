"""Checkpoints of a run, by orbax, written in the background: everything a step changes, and what the run is."""

import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sdv_jax.errors import UserError
from sdv_jax.train.state import TrainState

_ITEMS = ("state", "run")


class Checkpoints:
    """The checkpoints of one run, named by the number of steps done: the newest `keep`, and every `keep_every`-th step.

    A checkpoint is there completely or not at all, whatever interrupts its writing. All processes call every method.
    """

    def __init__(self, folder: Path, *, keep: int = 1, keep_every: int = 0):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.resolve(), options=options, item_names=_ITEMS)

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(
        self, step: int, state: TrainState, *, key: jax.Array, data: Mapping[str, object], config: Mapping[str, object]
    ) -> None:
        """Begins to write a checkpoint after `step` steps, once; waits only for the one before.

        `data` is the position in the data, see `Plan.data_state`.
        """
        if step in self.manager.all_steps():
            return
        # A copy, because the next step donates the buffers that the writing thread would still be reading.
        kept = jax.tree.map(jnp.copy, state._asdict())
        run = {"key": _key_data(key), "data": dict(data), "config": dict(config)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(kept), run=ocp.args.JsonSave(run))
        self.manager.save(step, args=items)

    def restore(self, like: TrainState, *, key: jax.Array, data: Mapping[str, object]) -> tuple[int, TrainState] | None:
        """(steps done, state) of the newest checkpoint that can be read, in the shapes, dtypes and shardings of `like`;
        None where there is no checkpoint.

        One that cannot be read is told on stderr and put aside as `damaged-N`. Raises UserError where none can be
        read, for another run's, and for data that are not those the run has read.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
        for step in steps:
            try:
                found = self.manager.restore(step, args=items)
                run = {name: found["run"][name] for name in ("key", "data")}
            except Exception as error:  # whatever a damaged file makes orbax and tensorstore raise
                self._put_aside(step, error, last=step == steps[-1])
                continue
            if run["key"] != _key_data(key):
                where = self.folder / str(step)
                raise UserError(f"checkpoint {where} was made with another train.seed; use a new workdir")
            _check_data(self.folder / str(step), run["data"], data)
            return step, TrainState(**found["state"])
        return None

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()

    def _put_aside(self, step: int, error: Exception, *, last: bool) -> None:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        where = self.folder / str(step)
        if last:
            raise UserError(
                f"checkpoint {where} cannot be read ({told}), and there is no older one; use a new workdir"
            ) from error
        if jax.process_index() == 0:
            print(f"sdv: checkpoint {where} cannot be read ({told}); going on from the one before it", file=sys.stderr)
            where.rename(self.folder / f"damaged-{step}")
        self.manager.reload()


def _key_data(key: jax.Array) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()


def _check_data(where: Path, before: Mapping, now: Mapping) -> None:
    """`sets` are the fingerprints of the data of each stream, which a run must not change under itself."""
    changed = [name for name, sets in before.get("sets", {}).items() if now["sets"].get(name, sets) != sets]
    if changed:
        raise UserError(
            f"checkpoint {where} was trained on other data: data.{changed[0]} has changed since; restore it, or use a "
            "new workdir"
        )
