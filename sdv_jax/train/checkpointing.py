"""Checkpoints of a run, by orbax: everything a step changes, and what shows that the run is the same one."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from sdv_jax.errors import UserError
from sdv_jax.train.state import TrainState


class Checkpoints:
    """The checkpoints of one run, named by the number of steps done; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int = 1):
        # Synchronous, because the next step donates the buffers that a background write would still be reading.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.resolve(), options=options, item_names=("state", "run"))

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, *, key: jax.Array, position: Mapping[str, int]) -> None:
        """Writes a checkpoint after `step` steps, once."""
        if step in self.manager.all_steps():
            return
        run = {"key": np.asarray(jax.random.key_data(key)).tolist(), "position": dict(position)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), run=ocp.args.JsonSave(run))
        self.manager.save(step, args=items)

    def restore(self, like: TrainState, *, key: jax.Array) -> TrainState:
        """The newest state, in the shapes, dtypes and shardings of `like`. Raises UserError for one of another run."""
        step = self.latest()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore())
        try:
            found = self.manager.restore(step, args=items)
        except (ValueError, KeyError, FileNotFoundError) as error:
            first = str(error).splitlines()[0][:200]
            raise UserError(
                f"checkpoint {self.folder / str(step)} does not fit this run ({first}); use a new workdir"
            ) from error
        if found["run"]["key"] != np.asarray(jax.random.key_data(key)).tolist():
            raise UserError(f"checkpoint {self.folder / str(step)} was made with another train.seed; use a new workdir")
        return TrainState(**found["state"])

    def close(self) -> None:
        self.manager.close()
