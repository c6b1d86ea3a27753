"""Configurations: ml_collections outside, frozen dataclasses inside.

Files in `configs/` are Python that fills a `ConfigDict` whose every key stands in one base file. `Reader.load` runs
such a file, applies overrides, and converts the result to a frozen dataclass of sections, which is where a misspelt key
or a wrong type is caught.
"""

import ast
import dataclasses
import difflib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sdv_jax
from sdv_jax.errors import UserError

Rule = tuple[Sequence[str], Callable[[Any], bool], str]  # keys, what holds for their values, how that is told


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads configurations of one kind.

    Attributes:
      kind: the dataclass; its fields are dataclasses, the sections, whose fields are the keys. Fields with a default
        are younger than the first files that were written, which may lack them.
      base: the file that holds every key with a comment, which messages name.
    """

    kind: type
    base: str

    def load(self, path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Any:
        """The configuration of the Python file `path` with `overrides` applied.

        `overrides` maps dotted keys ("train.steps") to values or their text, or is a list of
        "--config.train.steps=100". Raises UserError for a file that cannot be read, a key that does not exist (with
        near matches) or a value of the wrong type.
        """
        tree = _run_file(Path(path), self.base)
        pairs = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
        for key, new in pairs.items():
            self._override(tree, key, new)
        return self.from_tree(tree)

    def from_tree(self, tree: Mapping[str, Any]) -> Any:
        """Nested mappings, as in a `config.json`, to the frozen form."""
        return self._build(self.kind, tree, "")

    def _override(self, tree: dict, key: str, new: Any) -> None:
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(name), dict):
            raise UserError(f"config key {key!r} is a table, found {new!r} for it as a whole; set {key}.KEY one by one")
        in_table = len(parents) > 1  # such as model.transformer.num_layers, whose keys the model checks
        if not isinstance(node, dict) or (name not in node and not in_table):
            raise self._unknown(key, _leaves(tree))
        if not isinstance(new, str):
            node[name] = new
        else:
            node[name] = _parse(key, new, node[name]) if name in node else _literal(new)

    def _build(self, cls: type, tree: Mapping[str, Any], prefix: str) -> Any:
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        optional = {field.name for field in dataclasses.fields(cls) if _has_default(field)}
        for name in tree:
            if name not in fields:
                raise self._unknown(prefix + name, [prefix + field for field in fields])
        for name in fields.keys() - optional:
            if name not in tree:
                raise UserError(
                    f"config key {prefix + name!r} is missing: start from {self.base}, which holds every key"
                )
        given = {name: kind for name, kind in fields.items() if name in tree}
        return cls(**{name: self._convert(kind, tree[name], prefix + name) for name, kind in given.items()})

    def _convert(self, kind: Any, raw: Any, key: str) -> Any:
        if dataclasses.is_dataclass(kind):
            if not isinstance(raw, Mapping):
                raise _wrong_type(key, raw, dict)
            return self._build(kind, raw, f"{key}.")
        if kind == Mapping[str, Any]:
            if not isinstance(raw, Mapping):
                raise _wrong_type(key, raw, dict)
            return dict(raw)
        if kind == tuple[str, ...]:
            if not isinstance(raw, list | tuple) or not all(isinstance(item, str) for item in raw):
                raise _wrong_type(key, raw, tuple)
            return tuple(raw)
        if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
            return float(raw)
        if kind is int and isinstance(raw, float) and raw.is_integer():
            return int(raw)
        if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
            raise _wrong_type(key, raw, kind)
        return raw

    def _unknown(self, key: str, known: Sequence[str]) -> UserError:
        by_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
        near = by_name or difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{self.base} holds every key"
        return UserError(f"config key {key!r} does not exist: {hint}")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """["--config.train.steps=100"] -> {"train.steps": "100"}; "--config.train.steps 100" in two words works as well."""
    pairs, words = {}, list(arguments)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config.") or not key or not (equals or words):
            raise UserError(f"argument {word!r} is not understood: expected --config.SECTION.KEY=VALUE")
        pairs[key] = value if equals else words.pop(0)
    return pairs


def value(config: Any, key: str) -> Any:
    """The value behind a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for the first dotted key whose value is none of its choices."""
    for key, known in choices.items():
        if value(config, key) not in known:
            raise UserError(f"config key {key!r}: expected one of {', '.join(known)}, found {value(config, key)!r}")


def check_rules(config: Any, rules: Sequence[Rule]) -> None:
    """Raises UserError for the first dotted key whose value breaks its rule."""
    for keys, holds, expected in rules:
        for key in keys:
            if not holds(value(config, key)):
                raise UserError(f"config key {key!r}: expected {expected}, found {value(config, key)!r}")


def _run_file(path: Path, base: str) -> dict[str, Any]:
    if path.suffix != ".py" and path.is_file():
        raise UserError(f"config {path}: not a Python file; expected one with get_config(), for example {base}")
    if not path.is_file():
        raise UserError(f"config {path}: no such file; expected a Python file with get_config(), for example {base}")
    # A config imports its parent as `configs.base`, whichever directory the command was started in.
    roots = [str(path.resolve().parent.parent), str(Path(sdv_jax.__file__).parent.parent)]
    sys.path[:0] = roots
    try:
        spec = importlib.util.spec_from_file_location("sdv_jax_config", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config().to_dict()
    except (Exception, SystemExit) as error:  # whatever the user's own Python raises
        raise UserError(f"config {path}: {_first_line(error)}; correct the file") from error
    finally:
        for root in roots:
            sys.path.remove(root)


def _first_line(error: Exception) -> str:
    first = str(error.args[0] if error.args else error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _parse(key: str, text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    if isinstance(current, bool):
        if text.lower() not in ("true", "false"):
            raise _wrong_type(key, text, bool)
        return text.lower() == "true"
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _leaves(tree: Mapping[str, Any]) -> list[str]:
    return [f"{section}.{name}" for section, names in tree.items() for name in names]


def _wrong_type(key: str, raw: Any, kind: Any) -> UserError:
    hint = f"; one text alone is written with a comma, ({raw!r},)" if kind is tuple and isinstance(raw, str) else ""
    return UserError(f"config key {key!r}: expected {kind.__name__}, found {raw!r}{hint}")
