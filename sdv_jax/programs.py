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
        self._static = static
        self._jitted = jax.jit(function, static_argnames=static)
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, *arguments: Any, progress: Progress, **keywords: Any) -> Any:
        """The result, not yet waited for. `keywords` hold every static keyword, and arrays by name."""
        return self.compiled(*arguments, progress=progress, **keywords)(
            *arguments, **{name: value for name, value in keywords.items() if name not in self._static}
        )

    def compiled(self, *arguments: Any, progress: Progress, **keywords: Any) -> Callable:
        """The executable for such arguments, compiled if it is new."""
        key = self._key(arguments, keywords)
        if key not in self._compiled:
            with progress.stage(f"compiling {self.name}"):
                self._compiled[key] = self._jitted.lower(*arguments, **keywords).compile()
        return self._compiled[key]

    @property
    def count(self) -> int:
        """How many executables there are."""
        return len(self._compiled)

    def _key(self, arguments: tuple, keywords: dict) -> tuple:
        static = tuple(keywords[name] for name in self._static)
        traced = {name: value for name, value in keywords.items() if name not in self._static}
        leaves, tree = jax.tree.flatten((arguments, traced))
        return static, tree, tuple((jax.typeof(leaf), leaf.sharding) for leaf in leaves)
