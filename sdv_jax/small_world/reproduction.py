"""Paper A's ablations in the small world: the same training with one thing changed, several seeds, all scored alike.

    python -m sdv_jax.small_world.reproduction --workdir runs/reproduction [--family cogvideox] [--row full ...]

A run that was interrupted goes on, what is finished is not done again. Each run leaves its raw scores, per clip, in
`docs/reproduction/FAMILY/ROW-SEED.json`; `sdv_jax.small_world.reproduction_report` makes the page of them.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from sdv_jax.data.files import make_folder
from sdv_jax.data.video import to_uint8
from sdv_jax.errors import UserError
from sdv_jax.small_world import demo
from sdv_jax.small_world.pool import Trials, trials
from sdv_jax.small_world.score import identity_errors, score_clips
from sdv_jax.small_world.world import World
from sdv_jax.train import config as configs
from sdv_jax.train import datasets, loop, monitors


class Row(NamedTuple):
    """One line of the table: what differs from the full recipe, and with how many seeds it is trained."""

    settings: dict
    seeds: int


ROWS = {
    "full": Row({}, 3),
    "image-only": Row({"switch.motion_probability": 0.0}, 3),
    "video-only": Row({"switch.motion_probability": 1.0}, 1),
    "two-stage": Row({"switch.order": "stages"}, 3),
    "no-reference-in-motion": Row({"motion.references": 0}, 3),
    "first-frame-no-drop": Row({"motion.frame": "first", "motion.token_drop": 0.0}, 3),
    "p-0.4": Row({"switch.motion_probability": 0.4}, 1),
    "p-0.6": Row({"switch.motion_probability": 0.6}, 1),
    "rank-4": Row({"lora.rank": 4, "lora.alpha": 4.0}, 1),
    "rank-16": Row({"lora.rank": 16, "lora.alpha": 16.0}, 1),
    "rank-64": Row({"lora.rank": 64, "lora.alpha": 64.0}, 1),
}
# Shorter than the small world's own runs, so that all rows of both families fit into a night on two CPU cores.
COMMON = {
    "train.steps": 800, "train.save_every": 200, "train.ema_decay": 0.99, "optimizer.cycles": 1,
    "identity.batch_size": 32, "motion.batch_size": 16,
    "validation.rows": 64, "validation.every": 200, "gradients.every": 40,
}  # fmt: skip
SAMPLING = demo.Sampling()
RESULTS = demo.ROOT / "docs" / "reproduction"


def run(workdir: Path, results: Path, families: tuple[str, ...], rows: tuple[str, ...]) -> None:
    """All runs of the named rows that have no result yet: first seeds first, family by family."""
    trial = trials(World(), SAMPLING.pool_seed, SAMPLING.subjects)
    for family, row, seed in _order(families, rows):
        out = results / family / f"{row}-{seed}.json"
        if out.is_file():
            continue
        own, began = workdir / family / f"{row}-{seed}", time.perf_counter()
        config = _config(family, row, seed)
        data = datasets.load(config, workdir / family / "data")
        if not loop.run(config, own, data=data).finished:
            raise UserError("reproduction: training was interrupted; the same command goes on from its checkpoint")
        base, truth = _shared(workdir / family, demo.SHIPPED[family].base, trial)
        clips = demo.sample_adapted(demo.SHIPPED[family].base, own / "adapter", trial, SAMPLING)
        np.savez_compressed(own / "clips.npz", **{name: to_uint8(video) for name, video in clips.items()})
        found = {"base": base, "truth": truth} | {
            name: raw_scores(trial, video, shift=name == "wrong") for name, video in clips.items()
        }
        record = {
            "family": family, "row": row, "seed": seed, "settings": COMMON | ROWS[row].settings, "scores": found,
            "validation": _lines(own / monitors.VALIDATION), "gradients": _lines(own / monitors.GRADIENTS),
        }  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_rounded(record)))
        print(f"{out}  {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)


def raw_scores(trial: Trials, video: Float[np.ndarray, "n t h w 3"], *, shift: bool = False) -> dict[str, list]:
    """Numbers per clip; with `shift` clip i was given the reference of scene i + 1.

    identity: error against the scene's own subject; given: against the subject of the reference; speed: pixels per
    frame; background: the name seen; copied: the mean squared difference between frame 0 and the reference picture;
    start: where the subject is in frame 0 (x, y).
    """
    given = [*trial.scenes[1:], trial.scenes[0]] if shift else trial.scenes
    pictures = np.roll(trial.reference, -1, axis=0) if shift else trial.reference
    scores = score_clips(World(), video, trial.scenes)
    errors = scores.identity_error
    if shift:
        errors = identity_errors(World(), video, [[scene.subject] for scene in given])[:, 0]
    return {
        "identity": scores.identity_error.tolist(),
        "given": errors.tolist(),
        "motion": scores.motion_correct.tolist(),
        "background": [seen.background for seen in scores.seen],
        "background_correct": scores.background_correct.tolist(),
        "clean": scores.clean.tolist(),
        "whole": scores.whole.tolist(),
        "change": [min(value, 1e9) for value in scores.change.tolist()],
        "speed": [None if np.isnan(seen.velocity).any() else float(np.hypot(*seen.velocity)) for seen in scores.seen],
        "start": [None if np.isnan(seen.track[0]).any() else seen.track[0].tolist() for seen in scores.seen],
        "copied": np.square(video[:, 0] - pictures / 255).mean(axis=(1, 2, 3)).tolist(),
    }


def _order(families: tuple[str, ...], rows: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
    for seed in range(max(ROWS[row].seeds for row in rows)):
        for row in rows:
            yield from ((family, row, seed) for family in families if seed < ROWS[row].seeds)


def _config(family: str, row: str, seed: int) -> configs.Config:
    shipped = demo.SHIPPED[family]
    own = {"model.path": str(shipped.base), "train.seed": seed}
    return configs.load(shipped.config, COMMON | ROWS[row].settings | own)


def _shared(folder: Path, model: Path, trial: Trials) -> tuple[dict, dict]:
    """Raw scores of the base, which sees no reference, and of the true clips through the VAE; made once."""
    cache = folder / "base.json"
    if not cache.is_file():
        clips = demo.sample_base(model, trial, SAMPLING)
        np.savez_compressed(folder / "base.npz", **{name: to_uint8(video) for name, video in clips.items()})
        cache.write_text(json.dumps([raw_scores(trial, clips[name]) for name in ("base", "truth")]))
    return tuple(json.loads(cache.read_text()))


def _rounded(value):
    """Floats at six digits: a third of the size, and more than the scores are worth."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/reproduction")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--family", action="append", choices=tuple(demo.SHIPPED))
    parser.add_argument("--row", action="append", choices=tuple(ROWS))
    arguments = parser.parse_args()
    workdir = make_folder(arguments.workdir, what="workdir")
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").resolve()))
    run(workdir, arguments.results, tuple(arguments.family or demo.SHIPPED), tuple(arguments.row or ROWS))


if __name__ == "__main__":
    main()
