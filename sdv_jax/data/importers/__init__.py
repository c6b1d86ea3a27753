"""Importers: one small file per layout in which users and publishers keep their data; docs/data_formats.md."""

import dataclasses
import difflib
import importlib
from pathlib import Path

from sdv_jax.data.importers.item import Clip, Frame, Importer, Item, Picture, Rejected
from sdv_jax.errors import UserError

__all__ = ["FORMATS", "Clip", "Frame", "Importer", "Item", "Picture", "Rejected", "open_source"]

FORMATS = ("subjects200k", "pexels", "folder", "text_lists", "metadata", "opens2v")  # each a module beside this one

_KINDS = {tuple: "a list of texts", bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def open_source(format: str, path: str | Path, **options) -> Importer:
    """The items of the set at `path`, which is laid out as `format`.

    Raises:
      UserError: an unknown format or option, an option of the wrong type, or a set that is broken as a whole.
    """
    if format not in FORMATS:
        raise UserError(f"unknown data format {format!r}{_near(format, FORMATS)}; choose one of: {', '.join(FORMATS)}")
    module = importlib.import_module(f"{__name__}.{format}")
    fields = {field.name: field for field in dataclasses.fields(module.Options)}
    for name in options:
        if name not in fields:
            raise UserError(
                f"data format {format} has no option {name!r}{_near(name, fields)}; it has: {', '.join(fields)}"
            )
    values = {name: _converted(value, fields[name].default, name) for name, value in options.items()}
    return module.Importer(Path(path), module.Options(**values))


def _converted(value, default, name: str):
    """`value` as an object of the default's type, where nothing is lost by it."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        if all(isinstance(each, str) for each in value):
            return tuple(value)
    elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(default, str) and isinstance(value, Path):
        return str(value)
    elif type(value) is type(default):
        return value
    raise UserError(f"option {name} is {value!r}; expected {_KINDS[type(default)]}, as {default!r}")


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
