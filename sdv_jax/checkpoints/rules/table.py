"""What a conversion rule is: two name templates and a named transform, readable in both directions.

A template is a dotted name with placeholders. `{i}` stands for an integer, `{kind:conv1|conv2}` for what its expression
matches; a placeholder of the torch name occurs in our path too, except `{l}`, the layer, which becomes the leading axis
of a stacked leaf.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


@dataclass(frozen=True)
class Transform:
    """How one tensor's values are laid out there and here; the two functions are inverses and only move elements."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _axes(*order: int) -> Transform:
    inverse = tuple(int(n) for n in np.argsort(order))
    return Transform(lambda a: a.transpose(order), lambda a: a.transpose(inverse))


def patches(size: int) -> Transform:
    """A convolution over p×p patches [d, c, p, p] as a matrix [p·p·c, d] on pixels in (row, column, channel) order."""
    return Transform(
        lambda a: a.transpose(2, 3, 1, 0).reshape(size * size * a.shape[1], a.shape[0]),
        lambda a: a.reshape(size, size, -1, a.shape[-1]).transpose(3, 2, 0, 1),
    )


def patches_3d(sizes: tuple[int, int, int]) -> Transform:
    """A convolution over t×p×q patches [d, c, t, p, q] as a matrix [t·p·q·c, d] on (frame, row, column, channel)."""
    return Transform(
        lambda a: a.transpose(2, 3, 4, 1, 0).reshape(-1, a.shape[0]),
        lambda a: a.reshape(*sizes, -1, a.shape[-1]).transpose(4, 3, 0, 1, 2),
    )


SAME = Transform(lambda a: a, lambda a: a)
LINEAR = _axes(1, 0)  # [out, in] <-> [in, out]
CONV2D = _axes(2, 3, 1, 0)  # [out, in, h, w] <-> [h, w, in, out]
CONV3D = _axes(2, 3, 4, 1, 0)  # [out, in, t, h, w] <-> [t, h, w, in, out]


@dataclass(frozen=True)
class Rule:
    """One row of a table: `torch` and `ours` name the same tensor, `transform` says how its axes differ."""

    torch: str
    ours: str
    transform: Transform = SAME

    @property
    def stacked(self) -> bool:
        """Whether our leaf holds all layers of this tensor, stacked in front."""
        return "{l}" in self.torch

    @cached_property
    def _expressions(self) -> dict[str, str]:
        return {name: expression or r"\d+" for name, expression in _PLACEHOLDER.findall(self.torch)}

    @cached_property
    def _patterns(self) -> tuple[re.Pattern, re.Pattern]:
        return self._compile(self.torch), self._compile(self.ours)

    def _compile(self, template: str) -> re.Pattern:
        parts, at = [], 0
        for found in _PLACEHOLDER.finditer(template):
            parts += [re.escape(template[at : found.start()]), f"(?P<{found[1]}>{self._expressions[found[1]]})"]
            at = found.end()
        return re.compile("".join(parts) + re.escape(template[at:]))

    def torch_name(self, path: str, layer: int | None = None) -> str | None:
        """The torch name of `path` (of layer `layer`, where stacked), or None if this rule is not about it."""
        found = self._patterns[1].fullmatch(path)
        return found and _fill(self.torch, found.groupdict() | {"l": layer})

    def path(self, name: str) -> tuple[str, int | None] | None:
        """Our path and the layer of the torch tensor `name`, or None if this rule is not about it."""
        found = self._patterns[0].fullmatch(name)
        if found is None:
            return None
        values = found.groupdict()
        return _fill(self.ours, values), int(values["l"]) if self.stacked else None


def _fill(template: str, values: dict) -> str:
    return _PLACEHOLDER.sub(lambda found: str(values[found[1]]), template)


@dataclass(frozen=True)
class Rules:
    """A component's table. `ignore`: torch names that hold no weight of ours. `aliases`: second names of tied ones."""

    table: Sequence[Rule]
    ignore: Sequence[str] = ()
    aliases: dict[str, str] = field(default_factory=dict)

    def of_path(self, path: str) -> Rule | None:
        """The one rule that names our leaf `path`; two would be a mistake in the table."""
        rules = [rule for rule in self.table if rule.torch_name(path, 0) is not None]
        assert len(rules) <= 1, f"{path} is named by several rules: {[rule.ours for rule in rules]}"
        return rules[0] if rules else None

    def ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)

    def to_torch_module_name(self, path: str, layer: int | None = None) -> str:
        """The torch module of a linear layer: ('blocks.attn1.to_q', 3) -> 'transformer_blocks.3.attn1.to_q'."""
        rule = self.of_path(f"{path}.kernel")
        if rule is None or rule.stacked != (layer is not None):
            raise KeyError(f"no linear layer {path!r}" + ("" if layer is None else f" with layer {layer}"))
        return rule.torch_name(f"{path}.kernel", layer).removesuffix(".weight")

    def from_torch_module_name(self, name: str) -> tuple[str, int | None]:
        """The inverse: 'transformer_blocks.3.attn1.to_q' -> ('blocks.attn1.to_q', 3); or KeyError."""
        for rule in self.table:
            found = rule.path(f"{name}.weight")
            if found is not None and found[0].endswith(".kernel"):
                return found[0].removesuffix(".kernel"), found[1]
        raise KeyError(f"no linear layer is called {name!r}")
