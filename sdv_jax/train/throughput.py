"""How fast a run is, and how far that is from what its devices could do.

    model FLOPs of a step = Σ over the products of the forward pass: FLOPs · (1 + factors that need a gradient)
    MFU = model FLOPs of a step / (seconds of the step · devices · peak FLOP/s of a device)

A factor needs a gradient where it is a trained weight or depends on one. So a product with a frozen weight counts
twice, with a trained one (all of them, or A and B of a LoRA) and of two activations three times, and what comes before
the first trained weight, such as a frozen text encoder, once. Nothing counts again for recomputation. Peaks are the
published dense bfloat16 ones.
"""

import dataclasses
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from sdv_jax.models.contract import Geometry
from sdv_jax.planning import flops
from sdv_jax.train import plan
from sdv_jax.train.config import Config
from sdv_jax.train.state import Tree, join
from sdv_jax.typing import Array

# FLOP/s of one device in bfloat16, by the first words of `device_kind`; the longest name that fits counts. The H100 SXM
# has the short name because its kind is "NVIDIA H100 80GB HBM3". A chip of TPU v3, of 123e12, is two devices.
PEAKS = {
    "NVIDIA A10": 125e12, "NVIDIA A10G": 70e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA L40": 181e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12,
    "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v4 lite": 138e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
    "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step of a program works through, over all devices: rows, transformer tokens, model FLOPs."""

    samples: int
    tokens: int
    flops: float


def step_flops(loss: Callable, trained, *arguments) -> float:
    """Model FLOPs of one step of a program, by the formula above; `loss(trained, *arguments)` is its forward pass."""
    return sum(flops.count(loss, trained, *arguments))


def peak_flops(stated: float) -> float | None:
    """FLOP/s of one device: `stated` (train.peak_tflops · 1e12) or that of the table; None where neither is known."""
    kind = jax.devices()[0].device_kind
    words = re.split("[ -]", kind)  # "NVIDIA A100-SXM4-80GB" is an A100, "NVIDIA L40S" no L40
    whole = () if "MIG" in words else PEAKS  # of a part of a device nothing is known
    names = sorted((name for name in whole if words[: name.count(" ") + 1] == name.split()), key=len)
    return stated or (PEAKS[names[-1]] if names else None)


def peak_memory() -> int:
    """Bytes at most in use so far: on the fullest local device, or of this process where devices do not tell (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    used = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(used) if used else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Costs:
    """The cost of each program at each shape of its batch, counted when it is first met."""

    def __init__(self, config: Config, losses: Mapping[str, Callable], geometry: Geometry, graph: nnx.GraphDef):
        self.config, self.losses, self.geometry, self.graph = config, losses, geometry, graph
        self.known: dict[tuple, Cost] = {}

    def of(self, program: str, trained: Tree, frozen: Tree, batch, empty_text: Array, key: Array) -> tuple[Cost, bool]:
        """(cost of a step over `batch`, whether it is the first of its kind, which is compiled for)."""
        shapes = {name: arrays["mean"].shape for name, arrays in batch.items()}
        kind = (program, *shapes.items())
        first = kind not in self.known
        if first:
            self.known[kind] = self._count(program, shapes, trained, frozen, batch, empty_text, key)
        return self.known[kind], first

    def _count(self, program: str, shapes, trained, frozen, batch, empty_text, key) -> Cost:
        def forward(trained, frozen, batch, empty_text, key):
            rows = jax.tree.map(lambda x: x[0], batch)
            return self.losses[program](join(self.graph, trained, frozen), rows, empty_text, key)

        one = step_flops(forward, trained, frozen, batch, empty_text, key)
        parts = self.config.train.accumulate
        samples = sum(shape[0] * shape[1] for shape in shapes.values())
        return Cost(samples, plan.tokens(self.config, program, shapes, self.geometry), parts * one)


class Meter:
    """Turns seconds of steps into rates. `goodput` is the share of the time since the run's first start, restarts and
    pauses included, that went into steps which count.
    """

    def __init__(self, *, began: float, counted: float, peak: float | None):
        self.began, self.counted, self.peak = began, counted, peak

    def read(self, cost: Cost, seconds: float, waited: float, *, counts: bool) -> dict[str, float]:
        """Of a step that took `seconds`, `waited` of them for its data; one that was compiled for does not count."""
        self.counted += (seconds - waited) * counts
        each = cost.flops / seconds / jax.device_count()
        known = {"mfu": each / self.peak} if self.peak else {}
        return {
            "samples_per_second": cost.samples / seconds, "tokens_per_second": cost.tokens / seconds,
            "tflops_per_device": each / 1e12, **known, "data_wait": waited / seconds,
            "goodput": self.counted / max(time.time() - self.began, 1e-9), "peak_memory": peak_memory(),
        }  # fmt: skip
