"""The demo: convert the shipped base, train the subject adapter, show it subjects it never saw, score the videos."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from sdv_jax import training
from sdv_jax.checkpoints.convert import convert
from sdv_jax.data.video import to_uint8, write_contact_sheet, write_video
from sdv_jax.errors import UserError
from sdv_jax.pipeline import Pipeline, load_pipeline
from sdv_jax.request import check_choice
from sdv_jax.small_world.captions import caption
from sdv_jax.small_world.pool import Trials, trials
from sdv_jax.small_world.score import compare, table
from sdv_jax.small_world.world import World
from sdv_jax.train import config as configs

ROOT = Path(__file__).parents[2]
SHOWN, ENLARGED = 8, 6  # rows of the sheet and number of videos written; factor by which pictures are enlarged


@dataclasses.dataclass(frozen=True)
class Shipped:
    """What a family's demo starts from: its base, the adapter's config, and a checkpoint of that run near its end."""

    base: Path
    config: Path
    started: Path


SHIPPED = {
    "cogvideox": Shipped(
        ROOT / "models" / "small-world-cogvideox", ROOT / "configs" / "small_world_cogvideox.py",
        ROOT / "models" / "small-world-subject",
    ),
    "wan": Shipped(
        ROOT / "models" / "small-world-wan", ROOT / "configs" / "small_world_wan.py",
        ROOT / "models" / "small-world-wan-subject",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the demo samples: held-out subjects, their seed, denoising steps, guidance on the text, noise seed."""

    subjects: int = 64
    pool_seed: int = 1
    steps: int = 25
    guidance: float = 1.5
    seed: int = 0

    def options(self) -> dict:
        """The pipeline's keywords."""
        return {"steps": self.steps, "guidance": self.guidance, "seed": self.seed}


def run(workdir: str | Path, family: str = "cogvideox", *, sampling: Sampling = Sampling()) -> dict[str, float]:
    """Leaves everything under `workdir`, prints where, and returns the verdicts of `score.compare`.

    Raises UserError when there is no such family, the shipped model is not there, or `workdir` cannot be used.
    """
    workdir, began = Path(workdir), time.perf_counter()
    shipped = SHIPPED[check_choice(family, "family", tuple(SHIPPED))]
    if not shipped.base.is_dir():
        raise UserError(
            f"demo: {shipped.base} is missing; run the demo from a checkout of the repository, installed with "
            "pip install -e ."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "model").is_dir():
        convert(shipped.base, workdir / "model")
    adapter = _train(workdir, shipped)
    results = workdir / "results"
    results.mkdir(exist_ok=True)
    trial = trials(World(), sampling.pool_seed, sampling.subjects)
    clips = sample(workdir / "model", adapter, trial, sampling)
    rows, verdicts = compare(World(), trial.scenes, **clips)
    (results / "scores.json").write_text(
        json.dumps({"rows": rows, "verdicts": verdicts, "sampling": dataclasses.asdict(sampling)}, indent=2)
    )
    text = table(rows) + "\n\n" + "\n".join(f"{name} = {value:.3f}" for name, value in verdicts.items()) + "\n"
    (results / "table.md").write_text(text)
    _pictures(results, trial, clips)
    plot_losses(workdir / "train" / "metrics.jsonl", results / "training.png")
    print(text)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes. Look at")
    for name in ("sheet.png", "training.png", "table.md", "videos/"):
        print(f"  {results / name}")
    return verdicts


def _train(workdir: Path, shipped: Shipped) -> Path:
    """The adapter of the full run; where a started run is shipped, only its last stretch is trained here."""
    run = workdir / "train"
    config = configs.load(shipped.config, {"model.path": str(workdir / "model")})
    if shipped.started.is_dir() and not run.exists():
        # renamed into place, so that an interrupted copy is never taken for a run
        shutil.copytree(shipped.started, workdir / "train.copying", dirs_exist_ok=True)
        (workdir / "train.copying").rename(run)
        done = max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
        print(f"Training resumes a shipped checkpoint of this same run at step {done} of {config.train.steps}: "
              "from step 0 it takes longer than a demo should.")  # fmt: skip
    if not training.train(config, run).finished:
        raise UserError("demo: training was interrupted; run the demo again to go on from its checkpoint")
    return run / "adapter"


def sample(model: Path, adapter: Path, trial: Trials, sampling: Sampling) -> dict[str, Float[np.ndarray, "n t h w 3"]]:
    """Clips for `score.compare`, from one noise."""
    return sample_base(model, trial, sampling) | sample_adapted(model, adapter, trial, sampling)


def sample_base(model: Path, trial: Trials, sampling: Sampling) -> dict[str, Float[np.ndarray, "n t h w 3"]]:
    """What the base makes without a reference, and the true clips through the VAE."""
    pipe = load_pipeline(model)
    base = pipe([caption(scene, marked=False) for scene in trial.scenes], **sampling.options())
    return {"base": base, "truth": _reconstruct(pipe, trial.video)}


def sample_adapted(
    model: Path, adapter: Path, trial: Trials, sampling: Sampling
) -> dict[str, Float[np.ndarray, "n t h w 3"]]:
    """What the adapted model makes of the right reference, and of a wrong one: the next scene's."""
    pipe = load_pipeline(model, adapter=adapter)
    mean, _ = pipe.encode(_centred(trial.reference[:, None]))
    references = np.asarray(pipe.traits.latents.to_model(mean))
    adapted = pipe(trial.captions, reference_latents=references, **sampling.options())
    wrong = pipe(trial.captions, reference_latents=np.roll(references, -1, axis=0), **sampling.options())
    return {"adapted": adapted, "wrong": wrong}


def _reconstruct(pipe: Pipeline, video: UInt8[np.ndarray, "n t h w 3"]) -> Float[np.ndarray, "n t h w 3"]:
    mean, _ = pipe.encode(_centred(video))
    return np.clip(np.asarray(pipe.decode(mean)) / 2 + 0.5, 0, 1)


def _centred(pixels: UInt8[np.ndarray, "..."]) -> np.ndarray:
    return pixels.astype(np.float32) / 127.5 - 1


def _pictures(results: Path, trial: Trials, clips: dict[str, np.ndarray]) -> None:
    """sheet.png: reference | base | adapted | truth, three frames of each clip; videos/NN-*.mp4 of the same."""
    shown = {name: to_uint8(clips[name][:SHOWN]) for name in ("base", "adapted", "truth")}
    frames = (0, trial.video.shape[1] // 2, trial.video.shape[1] - 1)
    rows = [[trial.reference[i]] for i in range(min(SHOWN, len(trial.scenes)))]
    titles = ["reference"]
    for name, video in shown.items():
        titles += ["", name, *[""] * (len(frames) - 1)]
        for row, clip in zip(rows, video, strict=True):
            row += [np.full_like(row[0][:, :1], 255), *clip[list(frames)]]
    write_contact_sheet(results / "sheet.png", [[_enlarged(picture) for picture in row] for row in rows], titles=titles)
    for i in range(len(rows)):
        for name, video in shown.items():
            (results / "videos").mkdir(exist_ok=True)
            write_video(
                results / "videos" / f"{i:02d}-{name}.mp4", np.stack([_enlarged(frame) for frame in video[i]]), fps=8
            )


def _enlarged(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "i j 3"]:
    return picture.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)


def plot_losses(metrics: Path, out: Path) -> None:
    """The training curve: each task's loss over the steps, averaged over 50 of its steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for task in sorted({line["task"] for line in lines}):
        steps, losses = (np.array([line[key] for line in lines if line["task"] == task]) for key in ("step", "loss"))
        window = min(50, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, label=task)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean of 50 steps")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
