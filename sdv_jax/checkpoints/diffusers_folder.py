"""A diffusers pipeline folder as it lies on disk: what its json files say, and its weights matched with our models."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from sdv_jax.checkpoints.engine import Source, match
from sdv_jax.checkpoints.families import families
from sdv_jax.checkpoints.family import Family
from sdv_jax.checkpoints.safetensors_io import open_folder
from sdv_jax.errors import UserError, one_line
from sdv_jax.models.contract import check_defaults
from sdv_jax.models.text.tokenizer import check_vocabulary

FORMAT_VERSION = 1
DEFAULTS_FILE = "defaults.json"  # ours, and optional: the size and the steps that a model is meant to be sampled with
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = (
    "model_index.json", "defaults.json", "*/*.json", "*/*.safetensors", "tokenizer/*", "scheduler/*",
    "config.json", "*.safetensors", "*.safetensors.index.json", "*.pth", "google/*",  # Wan's original release
)  # fmt: skip


def locate(source: str | Path) -> Path:
    """The folder `source`, downloaded first if it is no folder but reads like a Hugging Face model id (org/name).

    Raises UserError if there is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(str(source)):
        raise UserError(f"{source}: not a folder; expected a diffusers pipeline folder or a Hugging Face id (org/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # whatever the network and the hub come up with
        raise UserError(
            f"{source}: no such folder, and it cannot be downloaded from Hugging Face ({one_line(error)})"
        ) from None


def read_config(folder: Path) -> dict:
    """What model.json says of a converted folder, except dtypes and checksums, gathered from a pipeline folder's json
    files.

    Raises UserError for a missing or unreadable file, an unknown class, component or config key.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(f"{folder}: no model_index.json; expected a diffusers pipeline folder")
    index = read_json(index_file)
    family = next((f for f in families() if index.get("_class_name") in f.pipelines), None)
    if family is None:
        raise UserError(
            f"{index_file}: unknown pipeline class {index.get('_class_name')!r}; "
            f"known: {', '.join(name for f in families() for name in f.pipelines)}"
        )
    _check_index(index, index_file, family)
    raw, configs, errors = {}, {}, []
    for name in _present(index, family):
        try:
            raw[name] = read_json(folder / name / "config.json")
            configs[name] = parse_component(family, name, raw[name], folder / name / "config.json")
        except UserError as error:
            errors.append(str(error))
    raise_all(errors)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    check_scheduler(family, scheduler, folder / "scheduler" / "scheduler_config.json")
    check_tokenizer(tokenizer(folder))
    defaults = folder / DEFAULTS_FILE
    return {
        "format_version": FORMAT_VERSION,
        "family": family.name,
        "variant": family.variant(configs),
        "source": str(folder.absolute()),
        "model_index": index,
        "config": raw,
        "scheduler": scheduler,
        "defaults": check_defaults(read_json(defaults), str(defaults)) if defaults.is_file() else {},
    }


def open_component(folder: Path, family: Family, name: str, raw: dict) -> Source:
    """The weights of one component, matched with the model its config describes; only headers are read.

    Raises UserError for files that are missing, damaged or do not hold exactly the model's tensors.
    """
    component = family.components[name]
    config = parse_component(family, name, raw, folder / name / "config.json")
    return match(
        open_folder(folder / name), component.leaves(config), component.rules(config), where=str(folder / name)
    )


def tokenizer(folder: Path) -> Path:
    """Where the tokenizer's files lie."""
    return folder / "tokenizer"


def parse_component(family: Family, name: str, raw: dict, where: Path):
    """The config object of component `name`; UserError for a class, key or value that the family does not have."""
    component = family.components[name]
    classes = raw.get("_class_name", raw.get("architectures", component.torch_class))
    if component.torch_class not in ([classes] if isinstance(classes, str) else classes or []):
        raise UserError(f"{where}: unknown class {classes!r}; expected {component.torch_class}")
    return component.parse(raw, where)


def check_tokenizer(folder: Path) -> None:
    """Raises UserError for a tokenizer folder that is incomplete or damaged."""
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder}: no tokenizer_config.json; the tokenizer's folder is missing or incomplete")
    check_vocabulary(folder)


def check_scheduler(family: Family, raw: dict, file: Path) -> None:
    """Raises UserError for scheduler settings that the family does not have; `file` says where they stand."""
    try:
        family.scheduler(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_json(file: Path) -> dict:
    """The object in `file`; UserError if it is missing or not a JSON object."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; the model's folder is incomplete") from None
    except RecursionError:
        raise UserError(f"{file}: not readable as JSON (its brackets nest too deep); restore the file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def raise_all(errors: Iterable[str]) -> None:
    """Raises what was collected, if anything, as one error of one line."""
    if errors := list(errors):
        raise UserError(" | ".join(errors))


def _present(index: dict, family: Family) -> list[str]:
    """The components of a pipeline: all, but for optional ones that its index leaves away or calls [null, null]."""
    def there(name: str) -> bool:
        return isinstance(index.get(name), list) and index[name][-1:] != [None]

    return [name for name, component in family.components.items() if not component.optional or there(name)]


def _check_index(index: dict, file: Path, family: Family) -> None:
    expected = {name: family.components[name].torch_class for name in _present(index, family)}
    parts = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    problems = [f"no {name} ({kind})" for name, kind in expected.items() if name not in parts]
    problems += [
        f"{name} has unknown class {parts[name]}, expected {kind}"
        for name, kind in expected.items()
        if parts.get(name, kind) != kind
    ]
    problems += [
        f"unknown component {name} ({kind})"
        for name, kind in parts.items()
        if name not in expected and name not in ("scheduler", "tokenizer")
    ]
    problems += [f"no {name}" for name in ("scheduler", "tokenizer") if name not in parts]
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
