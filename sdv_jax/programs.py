"""The compiled programs of a pipeline: text encoder, both halves of the VAE, one prediction, the whole denoising loop.

Compilation is told to the user while it happens, and never repeated for equal shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx

from sdv_jax.diffusion import classifier_free, conditional, run
from sdv_jax.models.text.encode import encode
from sdv_jax.progress import Progress


class Program:
    """`function` compiled once per combination of static keywords, argument shapes, dtypes and shardings.

    The same as `jax.jit(function, static_argnames=...)`, with compiling and running as two stages instead of one.
    Weights are arguments, never constants of the program, so that models of one architecture share it.
    """

    def __init__(self, function: Callable, *, name: str, static: tuple[str, ...]):
        self.name = name
        self._jitted = jax.jit(function, static_argnames=static)
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, *arguments: Any, stage: str, progress: Progress, **static: Any) -> Any:
        """The finished result; running is told as `stage`."""
        run = self.compiled(*arguments, progress=progress, **static)
        with progress.stage(stage):
            return jax.block_until_ready(run(*arguments))

    def compiled(self, *arguments: Any, progress: Progress, **static: Any) -> Callable:
        """The executable for such arguments (arrays, trees of arrays, None), compiled if it is new."""
        leaves, tree = jax.tree.flatten(arguments)
        key = tuple(static.items()), tree, tuple((jax.typeof(leaf), leaf.sharding) for leaf in leaves)
        if key not in self._compiled:
            with progress.stage(f"compiling {self.name}"):
                self._compiled[key] = self._jitted.lower(*arguments, **static).compile()
        return self._compiled[key]


# MARK: what runs


def _predict(state, latents, text, timesteps, reference, image, *, graph, options):
    call = nnx.merge(graph, state)
    given = {} if image is None else {"image": image}  # a family that takes no image need not know the word
    return call(latents, text, timesteps, reference=reference, **given, **dict(options))


def _sample(state, memory, latents, text, negative, reference, image, scales, key, step_noise, *, graph, solver,
            options, begin, end):  # fmt: skip
    """Steps begin..end-1: (what the solver remembers, latents)."""

    def predict(x, timesteps, conditions):
        text, reference, image = conditions
        return _predict(state, x, text, timesteps, reference, image, graph=graph, options=options)

    conditions = text, reference, image
    # Subject and first frame are in both halves: guidance strengthens the text alone.
    denoise = (
        conditional(predict, conditions)
        if negative is None
        else classifier_free(predict, conditions, negative=(negative, reference, image))
    )
    carry = (solver.init(latents) if begin == 0 else memory), latents
    return run(
        denoise, solver, carry, begin=begin, end=end, guidance=scales, key=key, step_noise=step_noise, progress=_report
    )


def _text(state, ids, *, graph, masked):
    return encode(nnx.merge(graph, state), ids, masked=masked)


TEXT = Program(_text, name="text encoder", static=("graph", "masked"))
ENCODE = Program(
    lambda state, video, *, graph, tiling: nnx.merge(graph, state).encode(video, tiling=tiling),
    name="encoder",
    static=("graph", "tiling"),
)
DECODE = Program(
    lambda state, latents, *, graph, tiling: nnx.merge(graph, state).decode(latents, tiling=tiling),
    name="decoder",
    static=("graph", "tiling"),
)
PREDICT = Program(_predict, name="transformer", static=("graph", "options"))
SAMPLE = Program(_sample, name="denoiser", static=("graph", "solver", "options", "begin", "end"))

# The compiled loop reports to whoever stands here: a callback is part of its program, and must not change.
_listeners: list[Callable[[], None]] = []


def _report(finished: int, steps: int) -> None:
    for advance in _listeners:
        advance()


@contextmanager
def reporting_to(advance: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `advance` is called after each denoising step."""
    _listeners.append(advance)
    try:
        yield
    finally:
        _listeners.remove(advance)
