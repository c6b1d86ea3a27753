"""The `sdv` command: parses what was typed and calls the library; no logic of its own.

A mistake in the input is one line, `sdv: error: ...`, and exit status 2. Ctrl-C is one line and status 130.
Nothing heavy is imported before it is known which command runs, so that `sdv --help` answers at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from sdv_jax.errors import UserError, of_a_file

SHEET_FRAMES = 13  # pictures of a video on its contact sheet, evenly spread


class _Parser(argparse.ArgumentParser):
    """argparse with its errors as UserErrors: one line instead of the usage text."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. `arguments` are those of the command line where absent."""
    return guarded(lambda: _run(sys.argv[1:] if arguments is None else list(arguments)))


def guarded(command: Callable[[], int | None]) -> int:
    """Calls `command` and returns its exit status; what a user can mend is told in one line, and so are notes."""
    logger, notes = logging.getLogger("sdv_jax"), logging.StreamHandler(sys.stderr)
    notes.setFormatter(logging.Formatter("sdv: note: %(message)s"))
    logger.addHandler(notes)
    logger.propagate = False  # a library that configures the root logger would tell every note twice
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent is as it should be
    try:
        return command() or 0
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("sdv: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # a disk or a permission; what the library expects of files it tells as UserError
        return _fail(of_a_file(error))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        return _fail("out of memory; try a smaller video or batch, --tiling, or bfloat16")
    finally:
        logger.removeHandler(notes)
        logger.propagate = True


def _run(arguments: list[str]) -> int | None:
    parser = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _COMMANDS:
        parser.error(f"unknown command {arguments[0]!r}, choose one of: {', '.join(_COMMANDS)}")
    options, options.overrides = parser.parse_known_args(arguments)
    if options.overrides and options.run not in (_prepare, _train):
        options.parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    return options.run(options)


def _fail(message: str) -> int:
    print(f"sdv: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sdv", description="Subject-driven video generation in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (add_arguments, run, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run, parser=command)
    return parser


# MARK: convert, export


def _convert_arguments(command: argparse.ArgumentParser) -> None:
    source = "a diffusers pipeline folder, an original release of Wan, or a Hugging Face id"
    command.add_argument("source", metavar="SRC", help=source)
    command.add_argument("destination", metavar="DST", help="the folder to make; it must not exist")
    command.add_argument("--dtype", metavar="float32|bfloat16", help="of the stored weights; absent: as in the source")
    command.add_argument(
        "--verify", action="store_true", help="afterwards compare every component with diffusers (needs torch)"
    )


def _convert(options: argparse.Namespace) -> None:
    from sdv_jax.checkpoints.convert import convert

    convert(options.source, options.destination, dtype=options.dtype, verify=options.verify)
    print(options.destination)


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "paths", metavar="MODEL OUT", nargs="+", help="a converted folder and the diffusers folder to make"
    )
    merging = "add this adapter into MODEL's weights (of any layout) on the way; several times: all of them"
    command.add_argument("--merge", action="append", default=[], metavar="ADAPTER", help=merging)
    command.add_argument(
        "--merge-2", action="append", default=[], metavar="ADAPTER", help="the same for the second expert"
    )
    command.add_argument("--adapter", help="export this adapter instead; then only OUT.safetensors follows")
    command.add_argument(
        "--format", metavar="diffusers|comfyui|peft", help="key names of the adapter file (default: diffusers)"
    )
    command.add_argument(
        "--adapter-alpha", type=float, metavar="A", help="alpha of an adapter that does not say it (default: its rank)"
    )


def _export(options: argparse.Namespace) -> None:
    merged = options.merge + options.merge_2
    if options.adapter and merged:
        raise UserError("--adapter writes an adapter's file and --merge a model; give one of them")
    if not options.adapter and options.format is not None:
        raise UserError("--format is of an adapter's file; give --adapter too, or neither")
    if not options.adapter and not merged and options.adapter_alpha is not None:
        raise UserError("--adapter-alpha is of an adapter; give --adapter or --merge too, or neither")
    wanted = 1 if options.adapter else 2
    if len(options.paths) != wanted:
        shape = "--adapter ADAPTER OUT.safetensors" if options.adapter else "MODEL OUT"
        raise UserError(f"export takes {shape}, found {len(options.paths)} paths: {' '.join(options.paths)}")
    if options.adapter:
        from sdv_jax.checkpoints import adapter_files

        format = options.format or "diffusers"
        adapter_files.export(options.adapter, options.paths[0], format=format, alpha=options.adapter_alpha)
    elif merged:
        from sdv_jax.checkpoints.merge import merge

        merge(*options.paths, options.merge, options.merge_2, alpha=options.adapter_alpha)
    else:
        from sdv_jax.checkpoints.convert import export

        export(*options.paths)
    print(options.paths[-1])


# MARK: sample


def _sample_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, metavar="DIR", help="a converted folder or a diffusers pipeline folder")
    add("--prompt", required=True, metavar="TEXT", help="what the video shows")
    add(
        "--out",
        required=True,
        metavar="VIDEO.mp4",
        help="the video; a contact sheet of the same name, .png, comes beside it",
    )
    add("--reference", nargs="+", action="extend", default=[], metavar="IMAGE", help="pictures of the subject")
    add(
        "--reference-fit",
        metavar="crop|pad",
        default="crop",
        help="crop pictures to the video's shape (default), or pad them",
    )
    add("--image", metavar="IMAGE", help="the first frame, for image-to-video models")
    add("--adapter", metavar="PATH", help="a folder that training left, or a LoRA .safetensors file")
    add("--adapter-2", metavar="PATH", help="the same for the second expert of a model of two")
    add(
        "--adapter-alpha", type=float, metavar="A", help="alpha of a LoRA file that does not say it (default: its rank)"
    )
    streams = "tokens that the adapter's adaLN layers act on (default: as it says, else all)"
    add("--adapter-adaln", metavar="all|reference", help=streams)
    add("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    add("--height", type=int, metavar="H", help="pixels (default: the model's own)")
    add("--width", type=int, metavar="W", help="pixels (default: the model's own)")
    add("--num-frames", type=int, metavar="N", help="frames (default: the model's own)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    guidance = "strength of the prompt (default: the model's own; 1 switches guidance off)"
    add("--guidance", type=float, metavar="G", help=guidance)
    add("--guidance-2", type=float, metavar="G", help="the same for the second expert of a model of two")
    add("--dynamic-guidance", action="store_true", help="CogVideoX's cosine law over the steps")
    solvers = "solver: ddim or dpm (CogVideoX), unipc or euler (Wan); default: the model's"
    add("--scheduler", metavar="NAME", help=solvers)
    add("--flow-shift", type=float, metavar="S", help="Wan: shift of the noise levels (default: the model's)")
    add("--seed", type=int, default=0, metavar="S", help="same seed, same video (default: 0)")
    add("--fps", type=float, metavar="F", help="frames per second of the file (default: the model's own)")
    add("--dtype", metavar="float32|bfloat16", default="float32", help="of weights and computation (default: float32)")
    add("--tiling", action="store_true", help="decode in tiles: less memory")
    add("--offload", action="store_true", help="of two experts, only the one at work on the device")
    add("--quiet", action="store_true", help="no progress bars")


def _sample(options: argparse.Namespace) -> None:
    from sdv_jax.data.files import check_writable
    from sdv_jax.data.images import FITS, fit_image, read_image, silence_pillow
    from sdv_jax.data.video import check_fps, to_uint8, write_contact_sheet, write_video
    from sdv_jax.request import DTYPES, check_choice, check_request, check_takes_image

    out = check_writable(options.out, what="video")
    if out.suffix.lower() != ".mp4":
        better = f"{out.name.strip('.')}.mp4" if out.name.startswith(".") else out.with_suffix(".mp4").name
        raise UserError(f"--out {out} does not end in .mp4; videos are written as mp4, name it {better}")
    sheet = check_writable(out.with_suffix(".png"), what="contact sheet")
    for path in (out, sheet):
        given = [*options.reference, *([options.image] if options.image else [])]
        if any(path.exists() and os.path.exists(r) and os.path.samefile(path, r) for r in given):
            raise UserError(f"--out {out} would replace the picture {path}; choose another name")
    if options.fps is not None:
        check_fps(options.fps)
    check_choice(options.reference_fit, "reference fit", FITS)
    check_choice(options.dtype, "dtype", DTYPES)
    silence_pillow()
    pictures = [read_image(path) for path in options.reference]
    first_frame = read_image(options.image, name="image") if options.image else None

    from sdv_jax.checkpoints.model_folder import about
    from sdv_jax.diffusion import with_flow_shift
    from sdv_jax.pipeline import load_pipeline

    names = ("prompt", "negative_prompt", "steps", "guidance", "guidance_2", "seed")
    asked = {name: getattr(options, name) for name in names}
    size = {name: getattr(options, name) for name in ("num_frames", "height", "width")}
    # A wrong number is told now, not after the weights are read.
    model = about(options.model)
    scheduler = model.family.scheduler(model.raw["scheduler"])
    check_request(model.traits, **asked, size=tuple(size.values()), train_timesteps=scheduler.num_train_timesteps)
    if options.scheduler is not None:
        check_choice(options.scheduler, "scheduler", tuple(model.family.schedulers))
    if options.flow_shift is not None:
        with_flow_shift(scheduler, options.flow_shift)
    if first_frame is not None:
        check_takes_image(model.traits)
    pipe = load_pipeline(
        options.model,
        adapter=options.adapter,
        adapter_alpha=options.adapter_alpha,
        adapter_adaln=options.adapter_adaln,
        adapter_2=options.adapter_2,
        offload=options.offload,
        dtype=options.dtype,
        progress=not options.quiet,
    )
    video = pipe(
        **asked,
        **size,
        reference=pictures or None,
        image=first_frame,
        flow_shift=options.flow_shift,
        scheduler=options.scheduler,
        dynamic_guidance=options.dynamic_guidance,
        reference_fit=options.reference_fit,
        tiling=options.tiling,
        progress=not options.quiet,
    )
    frames = to_uint8(video[0])
    height, width = frames.shape[1:3]
    shown = [to_uint8(fit_image(p, height=height, width=width, fit=options.reference_fit) / 2 + 0.5) for p in pictures]
    count = min(len(frames), SHEET_FRAMES)
    shown += [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]
    write_video(out, frames, fps=options.fps or model.traits.fps)
    write_contact_sheet(sheet, [shown])
    amount = f"{len(frames)} frame{'s' * (len(frames) > 1)}"
    print(f"{out}  {amount} of {width}x{height}, contact sheet {sheet}")


# MARK: prepare, train, analyse, demo


def _prepare_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", required=True, metavar="FILE", help="a Python file such as configs/prepare_folder.py"
    )
    command.add_argument(
        "--process", metavar="I/N", help="which of N processes this is, from 0 (default: as SLURM or JAX say, else 0/1)"
    )
    command.epilog = (
        "--config.SECTION.KEY=VALUE sets a key of the config, for example --config.output.path=data/my_clips. The same "
        "command goes on where it was interrupted."
    )


def _prepare(options: argparse.Namespace) -> None:
    from sdv_jax.data import prepare, settings

    config = settings.load(options.config, options.overrides)
    print(prepare.tell(prepare.prepare(config, process=prepare.this_process(options.process)), config))


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, metavar="FILE", help="a Python file such as configs/base.py")
    command.add_argument(
        "--workdir", required=True, metavar="DIR", help="where the run leaves everything; an interrupted run goes on"
    )
    command.add_argument(
        "--coordinator", default="", metavar="HOST:PORT|auto",
        help="several processes: where the first one listens; auto: as Slurm, Kubernetes or Cloud TPU says",
    )  # fmt: skip
    command.add_argument("--processes", type=int, metavar="N", help="how many there are, with --coordinator HOST:PORT")
    command.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    command.epilog = (
        "--config.SECTION.KEY=VALUE sets a key of the config, for example --config.train.steps=100. Exit status: 0 "
        "done, 74 the disk refused (make room, start it again), 75 stopped by a signal after a checkpoint (start it "
        "again), 76 another process died or did not come (start all again), 2 wrong input."
    )


def _train(options: argparse.Namespace) -> int:
    from sdv_jax import training
    from sdv_jax.train import config

    loaded = config.load(options.config, options.overrides)
    return training.run_job(
        loaded, options.workdir, coordinator=options.coordinator, count=options.processes, index=options.process
    )


def _analyse_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "workdirs", metavar="WORKDIR", nargs="+", help="of a run that was trained with --config.gradients.every=N"
    )
    command.add_argument("--out", metavar="FILE.png", help="the picture (default: gradients.png in the first WORKDIR)")


def _analyse(options: argparse.Namespace) -> None:
    from pathlib import Path

    from sdv_jax.data.files import check_writable
    from sdv_jax.train import analysis

    runs = analysis.read_all(options.workdirs)
    out = check_writable(options.out or Path(options.workdirs[0], "gradients.png"), what="picture")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} does not end in .png; name it {out.with_suffix('.png').name}")
    analysis.plot(runs, out, maps=runs if len(runs) == 1 else ())
    print(f"{analysis.table(runs)}\n{out}")


def _demo_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workdir", metavar="DIR", help="where the results go (default: runs/demo, or runs/demo-FAMILY)"
    )
    command.add_argument("--family", default="cogvideox", metavar="cogvideox|wan", help="the base (default: cogvideox)")


def _demo(options: argparse.Namespace) -> None:
    from sdv_jax.data.files import make_folder
    from sdv_jax.request import check_choice
    from sdv_jax.small_world import demo

    check_choice(options.family, "family", tuple(demo.SHIPPED))
    workdir = options.workdir or ("runs/demo" if options.family == "cogvideox" else f"runs/demo-{options.family}")
    demo.run(make_folder(workdir, what="workdir"), options.family)


_COMMANDS = {
    "convert": (_convert_arguments, _convert, "A published checkpoint to a folder of this project."),
    "export": (
        _export_arguments,
        _export,
        "Back to a diffusers pipeline folder, adapters merged if wanted, or an adapter to a file for other tools.",
    ),
    "sample": (_sample_arguments, _sample, "A prompt, and pictures of a subject, to a video."),
    "prepare": (_prepare_arguments, _prepare, "Videos or pictures with captions to what training reads."),
    "train": (_train_arguments, _train, "Train an adapter, or a model, as a config file says."),
    "analyse": (_analyse_arguments, _analyse, "Runs' records of the two tasks' gradients to a picture and a table."),
    "demo": (_demo_arguments, _demo, "The whole path on the small world: train, sample, score."),
}

if __name__ == "__main__":
    sys.exit(main())
