"""Where a run's arrays live: on one device, or on a mesh of data × fsdp over the devices of all processes.

Batches are cut over both axes, weights over `fsdp` as the family's path table says; everything else is replicated. All
processes run one program, and every choice it makes on the host is a function of (config, step).
"""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from sdv_jax.errors import UserError
from sdv_jax.sharding import Table, spec_of
from sdv_jax.train.config import Mesh
from sdv_jax.train.state import Tree

BATCH_AXES = ("data", "fsdp")
_DAY = 24 * 3600 * 1000  # milliseconds


@dataclasses.dataclass(frozen=True)
class Devices:
    """`mesh` is None on one device."""

    mesh: jax.sharding.Mesh | None

    @classmethod
    def of(cls, config: Mesh) -> "Devices":
        """All devices of all processes, `mesh.fsdp` of them (0: all) beside each other in the fsdp axis.

        Raises UserError where that does not divide them.
        """
        count = jax.device_count()
        if count == 1 and config.fsdp in (0, 1):
            return cls(None)
        fsdp = config.fsdp or count
        if count % fsdp:
            raise UserError(f"config key 'mesh.fsdp': {fsdp} does not divide the {count} devices there are")
        kinds = (jax.sharding.AxisType.Explicit,) * 2
        return cls(jax.make_mesh((count // fsdp, fsdp), BATCH_AXES, axis_types=kinds))

    @property
    def shards(self) -> int:
        """Into how many parts a batch is cut."""
        return 1 if self.mesh is None else self.mesh.size

    def on_mesh(self):
        """The context that steps run in."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def check(self, name: str, batch_size: int, parts: int) -> None:
        """Raises UserError unless each of `parts` equal parts of a batch is cut evenly over the devices."""
        if batch_size % (parts * self.shards):
            raise UserError(
                f"config key '{name}.batch_size': {batch_size} rows cannot be cut evenly into train.accumulate = "
                f"{parts} parts over {self.shards} devices; give a multiple of {parts * self.shards}"
            )

    def mine(self, batch_size: int, parts: int = 1) -> np.ndarray:
        """The rows of a global batch, taken in `parts` parts one after the other, that this process reads."""
        each = batch_size // parts
        if self.mesh is None:
            return np.arange(batch_size)
        held = self._batches(1).addressable_devices_indices_map((each,)).values()
        rows = np.unique(np.concatenate([np.arange(each)[index] for index in held]))
        return np.concatenate([part * each + rows for part in range(parts)])

    def put_batch(self, batch: Mapping[str, Mapping[str, np.ndarray]], parts: int | None = None) -> dict[str, dict]:
        """This process's rows as global arrays on the devices; with `parts` as [parts, rows of a part, ...]."""
        return {
            name: {key: self._put(array, parts) for key, array in arrays.items()} for name, arrays in batch.items()
        }

    def put_weights(self, tree: Tree, tables: Mapping[str, Table]) -> Tree:
        """The weights of a model's parts, each by its path table; as they are without a mesh."""
        if self.mesh is None:
            return tree

        def put(path, leaf):
            part, *rest = (str(getattr(key, "key", key)) for key in path)
            return self._by_table(".".join(rest), leaf, tables[part])

        return jax.tree_util.tree_map_with_path(put, tree)

    def replicate(self, tree):
        """On every device."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        return jax.device_put(tree, jax.NamedSharding(self.mesh, jax.P()))

    def put_rest(self, tree):
        """Leaves that have no place on the mesh yet, such as counters of an optimiser, on every device."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: x if getattr(x.sharding, "mesh", None) == self.mesh else self.replicate(x), tree)

    def flags(self, signals: list[int]):
        """[devices] numbers, 1 on the devices of a process that was asked to stop: every step looks at all of them."""
        own = np.full(self.shards, bool(signals), np.int32)
        if self.mesh is None:
            return jax.device_put(own)
        return jax.make_array_from_callback(own.shape, self._batches(1), lambda index: own[index])

    def agreed(self, signals: list[int], stopping: bool) -> bool:
        """Whether to stop now: several processes only when a step has told all of them."""
        return stopping if jax.process_count() > 1 else bool(signals)

    def from_writer(self, number: int) -> int:
        """What the process that writes has for `number`, on every process. All processes call it."""
        if jax.process_count() == 1:
            return number
        multihost.get_barrier_sync_fn()(key="told", timeout_ms=_DAY)  # inside a collective there is less patience
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    def _by_table(self, path: str, value, table: Table):
        spec = spec_of(path, table)
        for size, axis in zip(value.shape, spec, strict=False):
            if axis is not None and size % self.mesh.shape[axis]:
                raise UserError(
                    f"config key 'mesh.{axis}': {self.mesh.shape[axis]} does not divide {path} of shape "
                    f"{tuple(value.shape)}; give a smaller number"
                )
        return jax.device_put(value, jax.NamedSharding(self.mesh, spec))

    def _batches(self, rank: int, *, parts: bool = False) -> jax.NamedSharding:
        lead = (None,) if parts else ()
        return jax.NamedSharding(self.mesh, jax.P(*lead, BATCH_AXES, *(None,) * (rank - 1 - len(lead))))

    def _put(self, array: np.ndarray, parts: int | None):
        if parts is not None:
            array = array.reshape(parts, -1, *array.shape[1:])
        if self.mesh is None:
            return jax.device_put(array)
        sharding, axis = self._batches(array.ndim, parts=parts is not None), 0 if parts is None else 1
        whole = list(array.shape)
        whole[axis] = self._whole(array.shape[axis])
        rows = self.mine(whole[axis])

        def local(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(whole[axis])[index[axis]]
            return np.take(array, np.searchsorted(rows, wanted), axis=axis)

        return jax.make_array_from_callback(tuple(whole), sharding, local)

    def _whole(self, rows: int) -> int:
        """Rows of the global batch of which this process holds `rows`."""
        held = len({device.id for device in self.mesh.local_devices})
        return rows * self.mesh.size // held
