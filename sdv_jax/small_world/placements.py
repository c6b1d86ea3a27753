"""Where should reference tokens stand in Wan? Adapters that differ in nothing else, trained and scored side by side.

    python -m sdv_jax.small_world.placements --workdir runs/placements [--steps 500]

Paper A says that plain continuation of the time axis, which serves CogVideoX, does badly in Wan, and not what to do. A
run that was interrupted goes on; what is finished is not done again. Leaves `table.md` and `scores.json` there.
"""

import argparse
import json
import math
from pathlib import Path

from sdv_jax import training
from sdv_jax.data.files import make_folder
from sdv_jax.errors import UserError
from sdv_jax.small_world import demo
from sdv_jax.small_world.pool import trials
from sdv_jax.small_world.score import compare
from sdv_jax.small_world.world import World
from sdv_jax.train import config as configs

PLACEMENTS = {
    "continuation, before the clip": {"placement": "before", "shift": 0.0},
    "continuation, after the clip": {"placement": "after", "offset": 1, "shift": 0.0},
    "own slot, far after the clip": {"placement": "after", "offset": 8, "shift": 0.0},
    "beside the first frames": {"placement": "before", "shift": 1.0},
    "after the clip, one grid width aside": {"placement": "after", "offset": 1, "shift": 1.0},
}
STEPS, SAMPLING = 500, demo.Sampling()
COLUMNS = (
    "identity_gap_closed", "wrong_reference_gap_closed", "motion_kept", "clean_kept", "identity_loss", "motion_loss",
)  # fmt: skip
LAST = 200  # steps whose losses are averaged: the same batches and noise for every placement


def run(workdir: str | Path, steps: int = STEPS, *, sampling: demo.Sampling = SAMPLING) -> dict[str, dict]:
    """Name of the placement -> verdicts of `score.compare`, and the losses of the last steps with a reference.

    Raises UserError where training was interrupted.
    """
    workdir, shipped, found = Path(workdir), demo.SHIPPED["wan"], {}
    trial = trials(World(), sampling.pool_seed, sampling.subjects)
    for number, (name, placement) in enumerate(PLACEMENTS.items()):
        own = workdir / f"{number}"
        if not (own / "scores.json").is_file():
            config = _config(shipped, steps, placement)
            if not training.train(config, own).finished:
                raise UserError("placements: training was interrupted; the same command goes on from its checkpoint")
            clips = demo.sample(shipped.base, own / "adapter", trial, sampling)
            _, verdicts = compare(World(), trial.scenes, **clips)
            (own / "scores.json").write_text(json.dumps(verdicts | _losses(own / "metrics.jsonl"), indent=2))
        found[name] = json.loads((own / "scores.json").read_text())
        (workdir / "scores.json").write_text(json.dumps(found, indent=2))
        (workdir / "table.md").write_text(table(found))
        print(table({name: found[name]}))
    return found


def _losses(metrics: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()[-LAST:]]
    found = {task: [line["loss"] for line in lines if line["task"] == task and line.get("reference", True)]
             for task in ("identity", "motion")}  # fmt: skip
    return {f"{task}_loss": sum(losses) / len(losses) if losses else math.nan for task, losses in found.items()}


def _config(shipped: demo.Shipped, steps: int, placement: dict) -> configs.Config:
    """The shipped run's config, shorter, in one cycle, with a placement of its own."""
    settings = {"train.steps": steps, "optimizer.cycles": 1, "model.path": str(shipped.base)}
    return configs.load(shipped.config, settings | {f"reference.{key}": value for key, value in placement.items()})


def table(found: dict[str, dict]) -> str:
    """One row per placement, in markdown."""
    head = ["reference stands", *COLUMNS]
    rows = [[name, *(f"{verdicts[column]:.4f}" for column in COLUMNS)] for name, verdicts in found.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/placements")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    print(table(run(make_folder(arguments.workdir, what="workdir"), arguments.steps)))


if __name__ == "__main__":
    main()
