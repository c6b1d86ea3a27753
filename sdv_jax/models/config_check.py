"""Checks that the configs of all models share: the kind and range of every number, before anything is built from it."""

import dataclasses
import math
import reprlib
from collections.abc import Collection, Mapping

from sdv_jax.errors import UserError

# Far beyond any model; a slip of the keyboard above it would trace, list or allocate for minutes before it is seen.
MOST = 2**24
MOST_LAYERS = 10_000


def check_numbers(
    label: str, config, *, may_be_zero: Collection[str] = (), most: Mapping[str, int] | None = None
) -> None:
    """Checks the fields of a config dataclass that are annotated `int`, `float` or `bool`.

    Whole numbers lie in 1..MOST, or up to `most[field]`; others are finite and above 0; the fields of `may_be_zero`
    may be 0 too. Raises UserError `label: field = value; expected ...` for the first one that does not.
    """
    for field in dataclasses.fields(config):
        value, zero = getattr(config, field.name), field.name in may_be_zero
        if field.type is int:
            check_whole(label, field.name, value, least=0 if zero else 1, most=(most or {}).get(field.name, MOST))
        elif field.type is float:
            number = isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)
            if not number or value < 0 or (value == 0 and not zero):
                refuse(label, field.name, value, "a finite number >= 0" if zero else "a finite number > 0")
        elif field.type is bool and type(value) is not bool:
            refuse(label, field.name, value, "true or false")


def check_whole(label: str, name: str, value, *, least: int = 1, most: int = MOST) -> None:
    """Raises UserError unless `value` is an int (true is none) in least..most."""
    if type(value) is not int or value < least:
        refuse(label, name, value, f"a whole number >= {least}")
    if value > most:
        refuse(label, name, value, f"a whole number <= {most}")


def refuse(label: str, name: str, value, expected: str):
    """Raises the UserError of one line; a long value is shortened in it."""
    raise UserError(f"{label}: {name} = {reprlib.repr(value)}; expected {expected}")
