"""The training loop, on one page: set up, restore, step, log, save."""

import dataclasses
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax

from sdv_jax.data import loading
from sdv_jax.data.latents import LatentDataset
from sdv_jax.errors import UserError
from sdv_jax.objectives.denoising import Denoiser
from sdv_jax.train import heldout, monitors, optimizer, plan, record, setup, state, step
from sdv_jax.train.checkpointing import Checkpoints
from sdv_jax.train.config import Config
from sdv_jax.train.devices import Devices
from sdv_jax.train.logging import RunLog
from sdv_jax.train.monitors import Monitor
from sdv_jax.train.state import TrainState

# (model, steps done, folder): draws samples with fixed seeds and leaves a contact sheet in the folder.
Sampler = Callable[[Denoiser, int, Path], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run stopped: steps done, whether all of them, and the model with its trained (averaged) weights.

    `signal` is the number of the signal that ended the run, if one did.
    """

    steps: int
    finished: bool
    model: Denoiser
    signal: int | None = None


def run(
    config: Config, workdir: str | Path, *, sampler: Sampler | None = None, stop_after: int | None = None,
    data: Mapping[str, LatentDataset] | None = None, model: Denoiser | None = None, shown: bool = True,
) -> Result:  # fmt: skip
    """Trains to `config.train.steps`, resuming the run that `workdir` holds, if any.

    `stop_after` ends the run early, after that many steps in all, with a checkpoint. `data` and `model` replace what
    the config names. SIGTERM and SIGINT end the run after the current step, with a checkpoint; `Result.finished` is
    then False. Raises UserError for a wrong config, data that do not fit, a workdir of another run, and a loss that is
    not finite.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)

    # ---- Data, model, plan ------------------------------------------------------------------------------------------
    devices = Devices.of(config.mesh)
    data = setup.datasets(config, workdir / "data") if data is None else data
    key = plan.run_key(config)
    base = setup.about(config)
    setup.check_data(config, data, base.traits)
    first = next(iter(data.values()), None)
    objective = setup.objective(config, base, first.scale if first else base.traits.latents)
    parts, held = heldout.split(config, setup.parts(data))
    schedule = plan.make(config, parts, objective, key, devices)
    token_ids = any(dataset.has_token_ids for dataset in data.values())
    model = model or setup.model(config, base, token_ids=token_ids, mesh=devices.mesh)
    record.claim(workdir, config)

    # ---- State and compiled steps -----------------------------------------------------------------------------------
    tx = optimizer.make(config.optimizer, config.train.steps)
    rate = optimizer.learning_rate(config.optimizer, config.train.steps)
    graph, *weights = state.split(model, mode=config.train.mode, train_encoder=config.text.train_encoder)
    trained, frozen = (devices.put_weights(tree, setup.placements(base)) for tree in weights)
    current = state.create(trained, tx, ema=config.train.ema_decay > 0)
    decay = config.train.ema_decay
    steps = {name: step.make(graph, loss, tx, rate, ema_decay=decay) for name, loss in schedule.losses.items()}
    key, empty_text = devices.replicate((key, first.empty_text))
    del model, weights, trained

    # ---- Resume -----------------------------------------------------------------------------------------------------
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep)
    start = checkpoints.latest() or 0
    if start:
        current = checkpoints.restore(current, key=key)
    stop = min(config.train.steps, config.train.steps if stop_after is None else stop_after)

    # ---- Steps ------------------------------------------------------------------------------------------------------
    watched = monitors.records(
        config, held, graph, frozen, objective, empty_text, devices=devices, workdir=workdir, start=start
    )
    if sampler and config.train.sample_every:
        watched.append(_samples(sampler, graph, frozen, config.train.sample_every, workdir / "samples"))
    log = RunLog(workdir, start=start, steps=config.train.steps, log_every=config.train.log_every, shown=shown)
    place = partial(devices.put_batch, parts=config.train.accumulate)
    batches = loading.iterate(schedule.batches, start, place) if start < stop else None
    done = start
    try:
        with devices.on_mesh(), _stop_requests() as signals:
            while done < stop and not signals:
                _watch(watched, current, done, log)
                current, metrics = steps[schedule.programs[done]](current, frozen, key, next(batches), empty_text)
                log.write(done, schedule.task(done), metrics)
                done += 1
                if done % config.train.save_every == 0 and done < stop:
                    log.flush()
                    checkpoints.save(done, current, key=key, position=schedule.position(done))
                    log.restart_clock()
            log.flush()
            if done == config.train.steps and start < done:
                _watch(watched, current, done, log)
        checkpoints.save(done, current, key=key, position=schedule.position(done))
    finally:
        log.close()
        checkpoints.close()
        if batches is not None:
            batches.close()

    # ---- Result -----------------------------------------------------------------------------------------------------
    model = state.join(graph, state.result(current), frozen)
    finished = done == config.train.steps
    if finished and config.train.mode == "lora":
        record.save_adapter(workdir / "adapter", model, config, base)
    return Result(done, finished, model, None if finished or not signals else signals[0])


def load_trained(
    workdir: str | Path, *, averaged: bool = True, data: Mapping[str, LatentDataset] | None = None
) -> Denoiser:
    """The model of a run with the weights of its newest checkpoint: the moving average, if one was kept and `averaged`.

    `data` replaces what the run's config names; only whether its text is token ids matters. Raises UserError without a
    checkpoint.
    """
    workdir = Path(workdir)
    config = record.read(workdir)
    data = setup.datasets(config, workdir / "data") if data is None else data
    token_ids = any(dataset.has_token_ids for dataset in data.values())
    model = setup.model(config, setup.about(config), token_ids=token_ids)
    graph, trained, frozen = state.split(model, mode=config.train.mode, train_encoder=config.text.train_encoder)
    like = state.create(trained, optimizer.make(config.optimizer, config.train.steps), ema=config.train.ema_decay > 0)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep)
    try:
        if checkpoints.latest() is None:
            raise UserError(f"{workdir}: no checkpoint there; train first")
        found = checkpoints.restore(like, key=plan.run_key(config))
    finally:
        checkpoints.close()
    return state.join(graph, state.result(found) if averaged else found.trained, frozen)


def _watch(watched: list[Monitor], current: TrainState, done: int, log: RunLog) -> None:
    """Calls the monitors whose turn it is after `done` steps."""
    for every, call in watched:
        if done % every == 0:
            log.flush()
            call(current, done)
            log.restart_clock()


def _samples(sampler: Sampler, graph, frozen, every: int, folder: Path) -> Monitor:
    return Monitor(every, lambda current, done: sampler(state.join(graph, state.result(current), frozen), done, folder))


@contextmanager
def _stop_requests():
    """A list of the SIGTERMs and SIGINTs that came; outside the main thread Python allows no handlers: always empty."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda got, _: received.append(got)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
