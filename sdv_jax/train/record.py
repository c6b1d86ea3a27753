"""What a workdir says about its run: the resolved config, and the adapter at the end."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from sdv_jax.checkpoints import adapter_files
from sdv_jax.checkpoints.model_folder import About
from sdv_jax.checkpoints.staging import staged
from sdv_jax.data.files import replacing
from sdv_jax.errors import UserError
from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.train import config as configs
from sdv_jax.train import setup
from sdv_jax.train.config import Config
from sdv_jax.train.processes import is_writer

# What may change when a run is resumed: its length, its housekeeping, and where things lie.
FREE = (
    "train.steps", "train.save_every", "train.keep", "train.keep_every", "train.log_every", "train.sample_every",
    "train.export", "train.remat", "train.heartbeat", "train.peak_tflops", "sample.guidance", "validation.every",
    "validation.bins", "gradients.every", "mesh.fsdp", "log.wandb_project", "data.workers", "model.path",
    "data.identity", "data.motion",
)  # fmt: skip
STAGED = ("train.steps",)  # what then says too where one stage ends and the next begins, in steps done already

# What the loaders of each style look for in a folder; to ComfyUI a name is a name.
_FILES = {
    "diffusers": adapter_files.WEIGHTS, "comfyui": adapter_files.WEIGHTS, "peft": adapter_files.PEFT_WEIGHTS,
}  # fmt: skip


def check(workdir: Path, config: Config) -> list[str]:
    """The settings that have changed since the run in the workdir began, in words; none where there is no run.

    Raises UserError for a setting that must not change, and where more steps are done already.
    """
    path, folders = workdir / "config.json", (workdir / "checkpoints").glob("*")
    done = max((int(folder.name) for folder in folders if folder.name.isdecimal()), default=0)
    if done > config.train.steps:
        raise UserError(
            f"{workdir} holds a run of {done} steps, past train.steps={config.train.steps}; use a new --workdir, or "
            f"train.steps={done} or more"
        )
    if not path.exists():
        return []
    before, now = _flat(read(workdir)), _flat(config)
    changed = {key: f"{key} {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]}
    free = set(FREE).difference(STAGED if config.switch.order == "stages" else ())
    if refused := ", ".join(told for key, told in changed.items() if key not in free):
        raise UserError(
            f"{workdir} holds a run with other settings ({refused}); use a new --workdir, or the same settings"
        )
    return list(changed.values())


def claim(workdir: Path, config: Config, changed: list[str]) -> None:
    """Writes config.json, and tells what `check` found changed."""
    if is_writer():
        if changed:
            print(f"sdv: {workdir} goes on with changed settings: {', '.join(changed)}", file=sys.stderr)
        with replacing(workdir / "config.json", what="config") as fresh:
            fresh.write_text(config.json())


def read(workdir: Path) -> Config:
    """The config of the run in `workdir`."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir}: no config.json there; expected the workdir of a training run")
    try:
        return configs.from_tree(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it, or use a new --workdir") from error


def save_adapter(folder: Path, model: Denoiser, config: Config, base: About) -> None:
    """The trained adapter as a folder that this package and diffusers load, with the files of `train.export` in it."""
    exports = folder / "exports"
    shutil.rmtree(exports, ignore_errors=True)  # of an adapter with fewer steps; a kill now must not leave it beside
    adapter_files.save(
        model.transformer,
        folder,
        targets=setup.targets(config, base),
        adaln_lora=config.lora.adaln,
        reference=setup.stated_placement(config, base),
        variant=base.raw["variant"],
        base=Path(config.model.path).name,
    )
    if styles := dict.fromkeys(config.train.export):
        size = (folder / adapter_files.WEIGHTS).stat().st_size
        with staged(exports, needed=len(styles) * size) as partial:
            for style in styles:
                adapter_files.export(folder, partial / style / _FILES[style], format=style)


def _flat(config: Config) -> dict[str, object]:
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    return {f"{section}.{name}": value for section, names in tree.items() for name, value in names.items()}
