"""The training loop, on one page: set up, restore, step, log, save. Every process of a job runs all of it."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from sdv_jax.data import loading, locks
from sdv_jax.data.files import make_folder
from sdv_jax.data.loading import Dataset, Mixture
from sdv_jax.errors import UserError
from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.train import (
    datasets,
    heldout,
    logging,
    monitors,
    optimizer,
    plan,
    processes,
    record,
    setup,
    state,
    step,
    throughput,
)  # fmt: skip
from sdv_jax.train.checkpointing import Checkpoints, Origin
from sdv_jax.train.config import Config
from sdv_jax.train.devices import Devices
from sdv_jax.train.logging import RunLog, Step
from sdv_jax.train.monitors import Monitor
from sdv_jax.train.state import TrainState

# (model, steps done, folder): draws samples with fixed seeds and leaves a contact sheet, folder/step_NNNNNN.png.
Sampler = Callable[[Denoiser, int, Path], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run stopped: steps done, whether all of them, and the model with its trained (averaged) weights.

    `signal` is the number of the signal that ended the run, if one came to this process.
    """

    steps: int
    finished: bool
    model: Denoiser
    signal: int | None = None


def run(
    config: Config, workdir: str | Path, *, sampler: Sampler | None = None, stop_after: int | None = None,
    data: Mapping[str, Dataset | Mixture] | None = None, model: Denoiser | None = None, shown: bool = True,
) -> Result:  # fmt: skip
    """Trains to `config.train.steps`, resuming the run that `workdir` holds, if any.

    `stop_after` ends the run early, after that many steps in all, with a checkpoint. `data` and `model` replace what
    the config names. SIGTERM and SIGINT, to any process, end the run after the step at hand (with several processes at
    most two later, the same for all), with a checkpoint; `Result.finished` is then False. Before the first step they
    raise `processes.Stopped`. Raises UserError for a wrong config, data that do not fit, a workdir of another run or in
    which one is at work, and a loss that is not finite; NotWritten for a checkpoint or an adapter that cannot be
    written. That other processes live is watched from outside, by a `Heartbeat`.
    """
    workdir = make_folder(workdir, what="workdir")
    devices = Devices.of(config.mesh)
    with processes.stop_requests() as signals, _alone(workdir, devices):
        data = datasets.load(config, workdir / "data") if data is None else _mixtures(data)
        with devices.on_mesh():
            return _run(
                config, workdir, devices, data, model, signals=signals, sampler=sampler, stop_after=stop_after,
                shown=shown,
            )  # fmt: skip


def _run(
    config: Config, workdir: Path, devices: Devices, data: Mapping[str, Mixture], model: Denoiser | None, *,
    signals: processes.StopRequests, sampler: Sampler | None, stop_after: int | None, shown: bool,
) -> Result:  # fmt: skip
    # ---- Data, model, plan ------------------------------------------------------------------------------------------
    c, key, base = config.train, plan.run_key(config), setup.about(config)
    logging.check_boards(config.log.wandb_project)
    datasets.check(config, data, base.traits)
    first = next(iter(data.values()), None)
    objective = setup.objective(config, base, first.scale if first else base.traits.latents)
    parts, held = heldout.split(config, {name: mixture.parts() for name, mixture in data.items()}, devices)
    schedule = plan.make(config, parts, objective, key, devices)
    token_ids = any(bucket.has_token_ids for mixture in data.values() for bucket in mixture.buckets)
    model = model or setup.model(config, base, token_ids=token_ids, mesh=devices.mesh)
    changed = record.check(workdir, config)

    # ---- State and compiled steps -----------------------------------------------------------------------------------
    tx, rate = optimizer.make(config.optimizer, c.steps), optimizer.learning_rate(config.optimizer, c.steps)
    graph, *weights = state.split(model, mode=c.mode, train_encoder=config.text.train_encoder)
    trained, frozen = (devices.put_weights(tree, setup.placements(base)) for tree in weights)
    current = devices.put_rest(state.create(trained, tx, ema=c.ema_decay > 0))
    steps = {
        name: step.make(graph, loss, tx, rate, ema_decay=c.ema_decay, remat=c.remat)
        for name, loss in schedule.losses.items()
    }
    key, empty_text = devices.replicate((key, first.empty_text))
    del model, weights, trained

    # ---- Resume -----------------------------------------------------------------------------------------------------
    origin = Origin.of(key, frozen)
    checkpoints = Checkpoints(workdir / "checkpoints", origin, keep=c.keep, keep_every=c.keep_every)
    restored = checkpoints.restore(current, data=schedule.data_state(0))
    start, current = restored or (0, current)
    record.claim(workdir, config, changed)
    stop = min(c.steps, c.steps if stop_after is None else stop_after)

    # ---- Steps ------------------------------------------------------------------------------------------------------
    watched = monitors.records(
        config, held, graph, frozen, objective, empty_text, devices=devices, workdir=workdir,
        kept=start if restored else -1,
    )  # fmt: skip
    if sampler and c.sample_every and start < c.steps:  # the sheets of a run that is done are there
        watched.append(_samples(sampler, graph, frozen, c.sample_every, workdir / "samples"))
    costs = throughput.Costs(config, schedule.losses, base.traits.geometry, graph)
    log = _log(config, workdir, schedule, start, shown)
    place = partial(devices.put_batch, parts=c.accumulate)
    batches = loading.iterate(schedule.batches, start, place, workers=config.data.workers) if start < stop else None
    save = partial(_save, checkpoints, config, schedule)
    done, signals.patient = start, True
    with _closing(checkpoints, log, batches):
        while done < stop:
            _watch(watched, current, done, log)
            if devices.agreed(signals, log.stopping):
                break
            program, asked = schedule.programs[done], time.perf_counter()
            batch, waited = next(batches), time.perf_counter() - asked
            cost, compiled = costs.of(program, current.trained, frozen, batch, empty_text, key)
            given = (current, frozen, key, batch, empty_text, devices.flags(signals))
            if compiled:
                processes.compile_together(steps[program], *given)
            current, metrics = steps[program](*given)
            log.write(Step(done, schedule.task(done), cost, waited, compiled), metrics)
            done += 1
            if done % c.save_every == 0 and done < stop:
                log.flush()
                save(done, current)
                log.restart_clock()
        log.flush()
        if done == c.steps:
            _watch(watched, current, done, log)
        save(done, current)

    # ---- Result -----------------------------------------------------------------------------------------------------
    finished = done == c.steps
    adapter = processes.on_host(state.result(current)) if c.mode == "lora" else state.result(current)
    model = state.join(graph, adapter, frozen)
    if finished and c.mode == "lora" and processes.is_writer():
        record.save_adapter(workdir / "adapter", model, config, base)
    return Result(done, finished, model, None if finished or not signals else signals[0])


def load_trained(
    workdir: str | Path, *, averaged: bool = True, data: Mapping[str, Dataset | Mixture] | None = None
) -> Denoiser:
    """The model of a run with the weights of its newest checkpoint: the moving average, if one was kept and `averaged`.

    The run may be at work: its workdir is only read. `data` replaces what the run's config names; only whether its text
    is token ids matters. Raises UserError without a checkpoint.
    """
    workdir = Path(workdir)
    config = record.read(workdir)
    data = datasets.load(config, workdir / "data") if data is None else _mixtures(data)
    token_ids = any(bucket.has_token_ids for mixture in data.values() for bucket in mixture.buckets)
    model = setup.model(config, setup.about(config), token_ids=token_ids)
    graph, trained, frozen = state.split(model, mode=config.train.mode, train_encoder=config.text.train_encoder)
    like = state.create(trained, optimizer.make(config.optimizer, config.train.steps), ema=config.train.ema_decay > 0)
    origin = Origin.of(plan.run_key(config), frozen)
    checkpoints = Checkpoints(workdir / "checkpoints", origin, reading=True)
    try:
        found = checkpoints.restore(like, data={"sets": {}})
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"{workdir}: no checkpoint there; train first")
    return state.join(graph, state.result(found[1]) if averaged else found[1].trained, frozen)


@contextmanager
def _alone(workdir: Path, devices: Devices) -> Iterator[None]:
    """No other run is at work in the workdir: two would remove each other's checkpoints and cut each other's files."""
    with ExitStack() as held:
        free = held.enter_context(locks.whole(workdir, key="--workdir")) if processes.is_writer() else True
        if not devices.from_writer(free):
            raise UserError(f"workdir {workdir}: a run is at work there; wait for its end, or use a new --workdir")
        yield


def _mixtures(data: Mapping[str, Dataset | Mixture]) -> dict[str, Mixture]:
    return {name: Mixture.of(dataset, name) for name, dataset in data.items()}


def _log(config: Config, workdir: Path, schedule: plan.Plan, start: int, shown: bool) -> RunLog:
    writes = processes.is_writer()
    (began, counted), boards = logging.since_first_start(workdir, step=start, write=writes), ()
    if writes:
        boards = (logging.TensorBoard(workdir / "tensorboard", start),)
        if project := config.log.wandb_project:
            boards += (logging.WandB(project, workdir, dataclasses.asdict(config)),)
    peak = throughput.peak_flops(config.train.peak_tflops * 1e12)
    meter = throughput.Meter(began=began, counted=counted, peak=peak)
    return RunLog(
        workdir, start=start, steps=config.train.steps, log_every=config.train.log_every, meter=meter,
        describe=schedule.batches.describe, writes=writes, shown=shown, boards=boards,
    )  # fmt: skip


@contextmanager
def _closing(*parts) -> Iterator[None]:
    """Closes them in order; after a failure all of them, whatever they say: a full disk fails each, the first tells."""
    try:
        yield
    except BaseException:
        for part in filter(None, parts):
            with suppress(Exception):
                part.close()
        raise
    for part in filter(None, parts):
        part.close()


def _save(checkpoints: Checkpoints, config: Config, schedule: plan.Plan, done: int, current: TrainState) -> None:
    checkpoints.save(done, current, data=schedule.data_state(done), config=dataclasses.asdict(config))


def _watch(watched: list[Monitor], current: TrainState, done: int, log: RunLog) -> None:
    """Calls the monitors whose turn it is after `done` steps, and shows what they found."""
    for every, call in watched:
        if done % every == 0:
            log.flush()
            log.show(call(current, done), done)
            log.restart_clock()


def _samples(sampler: Sampler, graph, frozen, every: int, folder: Path) -> Monitor:
    def draw(current: TrainState, done: int) -> dict[str, Path]:
        if done:
            sampler(state.join(graph, state.result(current), frozen), done, folder)
        sheet = folder / f"step_{done:06d}.png"
        return {"samples": sheet} if sheet.exists() else {}

    return Monitor(every, draw)
