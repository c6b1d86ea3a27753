"""What `sdv train` does: the training loop, with sample sheets drawn by the pipeline."""

import dataclasses
import logging
import os
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sdv_jax.checkpoints import model_folder
from sdv_jax.data.files import make_folder
from sdv_jax.data.loading import Mixture, stack
from sdv_jax.data.video import write_contact_sheet
from sdv_jax.errors import NotWritten, UserError, of_a_file, one_line
from sdv_jax.models.text.tokenizer import Tokenizer
from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.pipeline import Pipeline
from sdv_jax.train import datasets, heartbeat, loop, processes, setup
from sdv_jax.train.config import Config
from sdv_jax.train.devices import Devices
from sdv_jax.train.heartbeat import Heartbeat

ROWS = 4  # samples on a sheet
STEPS = 20  # denoising steps of a sample: enough to judge by


def train(config: Config, workdir: str | Path) -> loop.Result:
    """Runs the loop; with `train.sample_every`, sheets go to `workdir/samples`. Raises as `loop.run` does."""
    workdir = make_folder(workdir, what="workdir")  # before minutes are spent on data
    data = datasets.load(config, workdir / "data")
    sampler = Sheets(config, data) if config.train.sample_every else None
    return loop.run(config, workdir, sampler=sampler, data=data)


def run_job(
    config: Config, workdir: str | Path, *, coordinator: str = "", count: int | None = None, index: int | None = None
) -> int:
    """A run from its command line, alone or as process `index` of `count` (`processes.join`); returns its exit status.

    0: done. `processes.PREEMPTED`: stopped by a signal, after a checkpoint. `processes.IO_ERROR`: the disk failed.
    `heartbeat.PEER_LOST`: another process is gone. 2: the input is wrong. A line said what. With several processes an
    error in one ends it at once.
    """
    processes.simulate_devices()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs the stack traces of what it raises
    try:
        with processes.stop_requests():
            if coordinator:
                processes.join(coordinator, count, index, timeout=config.train.heartbeat)
            with Heartbeat.of(Path(workdir), config.train.heartbeat):
                result = train(config, workdir)
            return _tell(result, config, workdir)
    except processes.Stopped:
        print("sdv: stopped before the first step; the same command starts again", file=sys.stderr, flush=True)
        return _leave(processes.PREEMPTED)
    except UserError as error:
        print(f"sdv: error: {error}", file=sys.stderr, flush=True)
        return _leave(processes.IO_ERROR if isinstance(error, NotWritten) else 2)
    except OSError as error:
        print(f"sdv: error: {of_a_file(error)}", file=sys.stderr, flush=True)
        return _leave(processes.IO_ERROR)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        return heartbeat.end(
            f"a step across {jax.process_count()} processes failed ({one_line(error)}): another process died, or the "
            "network broke; start all processes again, they go on from the newest checkpoint"
        )
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()  # a defect: shown, and not held up by the others, who wait in a collective
        return _leave(1)
    finally:
        processes.ignore_stop_requests()


def _tell(result: loop.Result, config: Config, workdir: str | Path) -> int:
    if not result.finished:
        print(f"sdv: stopped at step {result.steps} of {config.train.steps}; the same command resumes", file=sys.stderr)
        return processes.PREEMPTED
    left = "adapter" if config.train.mode == "lora" else f"checkpoints/{result.steps}"
    if processes.is_writer():
        print(f"{Path(workdir) / left}  {result.steps} steps done")
    return 0


def _leave(status: int) -> int:
    """`status`; one of several processes ends here, without waiting for the others as JAX does at a normal exit."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(status)
    return status


class Sheets:
    """Draws the same samples at every call: captions and size of the first rows of the data, one seed.

    Left on each row stands the reference. Guidance is `sample.guidance`. Of two experts only the trained one
    denoises.
    """

    def __init__(self, config: Config, data: dict[str, Mixture]):
        path = config.model.path
        if not path:
            raise UserError(
                "config key 'train.sample_every': samples need the VAE of model.path, which is empty; give that, or 0"
            )
        about = model_folder.about(path)
        traits = dataclasses.replace(about.traits, boundary=None)
        self.config, self.about = config, dataclasses.replace(about, traits=traits)
        mixture = data.get("motion") or next(iter(data.values()))
        bucket = max(mixture.buckets, key=len)
        rows = range(min(ROWS, len(bucket)))
        drawn = stack([bucket[row] for row in rows])
        moments = [jnp.asarray(drawn[name][:, :1], jnp.float32) for name in ("reference_mean", "reference_logvar")]
        self.references = np.asarray(mixture.scale.draw(*moments, jax.random.key(0)))
        self.captions = [bucket.describe(row)["caption"] for row in rows]
        self.latent_shape = bucket.shapes["mean"]
        self.mesh = Devices.of(config.mesh).mesh
        self.parts = {
            name: model_folder.load_component(path, name, mesh=self.mesh) for name in ("vae", "text_encoder")
        }
        self.tokenizer = Tokenizer(Path(path) / "tokenizer")

    def __call__(self, model: Denoiser, steps: int, folder: Path) -> None:
        """Writes folder/step_NNNNNN.png."""
        parts = self.parts | ({"text_encoder": model.text_encoder} if model.text_encoder is not None else {})
        base = setup.about(self.config)
        options = setup.options(self.config, base)
        parts |= {base.family.denoiser: model.transformer}
        pipe = Pipeline(self.about, parts, self.tokenizer, options=options, mesh=self.mesh)
        subject = self.config.train.objective == "subject"
        references = self.references if subject else None
        frames, height, width = pipe.geometry.pixel_sizes(self.latent_shape)
        videos = pipe(
            self.captions, reference_latents=references, num_frames=frames, height=height, width=width, steps=STEPS,
            guidance=self.config.sample.guidance or None, seed=0, progress=False,
        )  # fmt: skip
        shown = [list(video) for video in videos]
        if subject:
            pictures = pipe.decode(pipe.traits.latents.to_vae(jnp.asarray(self.references)))
            pictures = np.clip(np.asarray(pictures) / 2 + 0.5, 0, 1)
            shown = [[picture[0], *video] for picture, video in zip(pictures, shown, strict=True)]
        if not processes.is_writer():
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_contact_sheet(folder / f"step_{steps:06d}.png", [[_bytes(frame) for frame in row] for row in shown])


def _bytes(frame: np.ndarray) -> np.ndarray:
    return np.rint(255 * frame).astype(np.uint8)
