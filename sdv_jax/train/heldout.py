"""Rows that no training step reads, and the batches made of them: what a run is measured on while it trains.

Their size is that of one part of a training batch, which is what the devices have room for.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping

from sdv_jax.data.loading import Part, hold_out, stack
from sdv_jax.errors import UserError
from sdv_jax.train import plan
from sdv_jax.train.config import Config
from sdv_jax.train.devices import Devices
from sdv_jax.train.processes import is_writer


def split(
    config: Config, parts: Mapping[str, tuple[Part, ...]], devices: Devices
) -> tuple[dict[str, tuple[Part, ...]], "HeldOut"]:
    """(parts to train on, held-out rows): of each dataset `validation.rows` rows of its largest bucket are held out.

    Raises UserError where too few rows are left, or the held-out ones fill no batch, or one cannot be cut evenly over
    the devices. Rows that are left over by whole batches are told.
    """
    rows, kept, held = config.validation.rows, dict(parts), {}
    measured, sizes = set(plan.measured_on(config).values()), plan.part_sizes(config)
    if not rows and (config.validation.every or config.gradients.every):
        raise UserError("config key 'validation.rows' is 0: validation and gradients are measured on held-out rows")
    for name in sorted(measured & set(parts)) if rows else ():
        largest = max(range(len(parts[name])), key=lambda i: len(parts[name][i].indices))
        part = parts[name][largest]
        plan.check_size(config, name, devices)
        if rows < sizes[name]:
            raise UserError(
                f"config key 'validation.rows': {rows} rows fill no batch of {name} ({sizes[name]} rows); give more"
            )
        if rows >= len(part.indices):
            raise UserError(
                f"config key 'validation.rows': {rows} of the {len(part.indices)} rows of data.{name} leave none to "
                "train on; give fewer"
            )
        if (over := rows % sizes[name]) and is_writer():
            told = f"{over} of {rows} rows of {name} fill no batch of {sizes[name]} and are not measured"
            print(f"sdv: note: config key 'validation.rows': {told}", file=sys.stderr)
        train, out = hold_out(len(part.indices), rows)
        rest = list(parts[name])
        rest[largest] = dataclasses.replace(part, indices=part.indices[train])
        kept[name], held[name] = tuple(rest), dataclasses.replace(part, indices=part.indices[out])
    return kept, HeldOut(held, {name: sizes[name] for name in held})


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out rows per dataset, and how many of them make a batch."""

    parts: Mapping[str, Part]
    sizes: Mapping[str, int]

    def batches(self, name: str, devices: Devices) -> Iterator[dict]:
        """As many whole batches as there are, on the devices, always in the same order."""
        part, size = self.parts[name], self.sizes[name]
        mine = devices.mine(size)
        for start in range(0, len(part.indices) - size + 1, size):
            rows = part.indices[start : start + size][mine]
            yield devices.put_batch({name: stack([part.rows[int(row)] for row in rows])})
