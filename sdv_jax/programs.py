"""Jitted functions whose compilation is seen: told to the user while it happens, and never repeated for equal shapes."""

from collections.abc import Callable
from typing import Any

import jax

from sdv_jax.progress import Progress


class Program:
    """`function` compiled once per combination of static keywords, argument shapes, dtypes and shardings.

    The same as `jax.jit(function, static_argnames=...)`, with compiling and running as two stages instead of one. Weights
    are arguments, never constants of the program, so that models of one architecture share it.
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

    @property
    def count(self) -> int:
        """How many executables there are."""
        return len(self._compiled)
