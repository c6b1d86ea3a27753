"""Preparation: a set of videos or pictures to records that training reads (docs/preparing.md).

    items of an importer -> decoded by threads, in order -> batches of one bucket -> VAE and text encoder -> records

The work is cut into units of consecutive items; of P processes, process p does the units p, p + P, p + 2 P ... A unit
is finished when DIR/shards/NNNNN.json is there, which is written after its records. Everything that an item becomes is
a function of the item and of the settings, so a unit that is done again after a kill leaves the same records. Whichever
process finds all units finished describes the whole; doing that twice leaves the same files.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdv_jax.checkpoints import model_folder
from sdv_jax.data import encoding, importers, page, records, samples, units
from sdv_jax.data.decode import Size
from sdv_jax.data.duplicates import Duplicates
from sdv_jax.data.encoding import Encoders
from sdv_jax.data.files import make_folder
from sdv_jax.data.images import silence_pillow
from sdv_jax.data.importers.item import Importer, Rejected
from sdv_jax.data.locks import claimed
from sdv_jax.data.manifest import Feature, write_json
from sdv_jax.data.records import ShardWriter
from sdv_jax.data.samples import Recipe, Sample, bucket_name
from sdv_jax.data.settings import Config, check_sizes
from sdv_jax.data.units import RejectedItem, Thumbnail, Unit
from sdv_jax.errors import UserError, one_line
from sdv_jax.models.contract import Traits

STATE = "prepare.json"
_LAUNCHERS = (("SLURM_PROCID", "SLURM_NTASKS"), ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
_DETAILS_SHOWN = 3  # reasons named when too many items are rejected


@dataclasses.dataclass(frozen=True)
class Result:
    """Counts of the whole folder so far, and whether it is a dataset now; `encoded`, `seconds`: of this call.

    `left_out` counts references that could not be read, of records that have others.
    """

    finished: bool
    records: int
    rejected: int
    left_out: int
    encoded: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """What all processes of a preparation agree on."""

    config: Config
    folder: Path
    importer: Importer
    duplicates: Duplicates
    traits: Traits
    recipe: Recipe
    settings: str

    @property
    def units(self) -> int:
        return -(-len(self.importer) // self.config.work.unit)

    def items(self, unit: int) -> range:
        """The items of a unit of work."""
        start = unit * self.config.work.unit
        return range(start, min(start + self.config.work.unit, len(self.importer)))

    def finished(self) -> dict[int, Unit]:
        """Units that are finished, whoever did them."""
        found = (units.read(self.folder, n, units=self.units, settings=self.settings) for n in range(self.units))
        return {unit.number: unit for unit in found if unit is not None}

    def features(self, size: Size) -> dict[str, Feature]:
        """What a record of a bucket holds."""
        g, dtype = self.traits.geometry, self.config.output.dtype
        mean = Feature(g.latent_shape(size.frames, size.height, size.width), dtype)
        view = Feature((self.recipe.count(size), *mean.shape[1:]), dtype)
        text = Feature((self.traits.text_length, self.traits.text_width), dtype)
        if self.config.output.text == "token_ids":
            text = Feature((self.traits.text_length,), "int32")
        return {"mean": mean, "logvar": mean, "reference_mean": view, "reference_logvar": view, "text": text}


def prepare(config: Config, *, process: tuple[int, int] = (0, 1), progress: bool = True) -> Result:
    """Prepares a set, or goes on with it; `process` is (which, of how many), each of which runs this once.

    Raises UserError for whatever is wrong with the settings, the set as a whole or the disk, when more items than
    `rejected.most` cannot be used, and while another process does the same; what was finished before is kept, and the
    same call goes on.
    """
    start = time.perf_counter()
    silence_pillow()
    job = _open(config)
    with claimed(job.folder, process):
        finished, encoded = _do(job, process, progress)
    count = sum(len(keys) for unit in finished.values() for keys in unit.keys.values())
    rejected = sum(len(unit.rejected) for unit in finished.values())
    left_out = sum(len(unit.left_out) for unit in finished.values())
    return Result(len(finished) == job.units, count, rejected, left_out, encoded, time.perf_counter() - start)


def tell(result: Result, config: Config) -> str:
    """The result in one line."""
    rate = f"; {result.encoded} of them now, {result.encoded / result.seconds:.2f} samples/s" if result.encoded else ""
    views = f", {result.left_out} references left out" if result.left_out else ""
    told = f"{config.output.path}  {result.records} records, {result.rejected} items rejected{views}{rate}"
    return told if result.finished else f"{told}; units of other processes are not finished yet"


def this_process(told: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(which process this is, of how many): of "I/N", of the launcher's variables where it is None, else (0, 1)."""
    if told is None:
        for names in _LAUNCHERS:
            if all(environment.get(name, "").isdecimal() for name in names):
                told = "/".join(environment[name] for name in names)
                break
        else:
            return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", told)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"process {told!r} is not understood; expected I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


# MARK: beginning


def _open(config: Config) -> Job:
    """Checks everything that can be checked before any weights are read, and that the folder was begun like this."""
    about = model_folder.about(config.model.path)
    recipe = config.recipe()
    check_sizes(recipe.buckets, about.traits.geometry)
    importer = importers.open_source(config.source.format, config.source.path, **config.source.options)
    folder = make_folder(config.output.path, what="prepared data")
    keys = [importer.key(i) for i in range(len(importer))]
    state = config.decides() | {
        "model (its files)": encoding.digest(config.model.path),
        "number of items": len(keys),
        "items of the source": hashlib.sha256("\n".join(keys).encode("utf-8", "surrogatepass")).hexdigest(),
    }
    _agree(folder, state)
    settings = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    make_folder(folder / units.FOLDER, what="prepared data")
    make_folder(folder / page.THUMBNAILS, what="thumbnails")
    duplicates = Duplicates(keys, partial(_usable, importer, recipe))
    return Job(config, folder, importer, duplicates, about.traits, recipe, settings)


def _agree(folder: Path, state: Mapping) -> None:
    """Notes what the folder is made of, or raises UserError where it was begun with something else."""
    path = folder / STATE
    if not path.is_file():
        if found := sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")):
            raise UserError(f"output.path {folder} holds other files ({found[0]}, ...); choose a new or empty folder")
        write_json(path, state, what="state of the preparation", indent=1)
        return
    try:
        before = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        told = one_line(error, typed=True)
        raise UserError(f"{path} is damaged ({told}); remove {folder} and prepare anew") from error
    state = json.loads(json.dumps(state))
    changed = [key for key in {**before, **state} if before.get(key) != state.get(key)]
    if changed:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {state.get(key)!r}" for key in changed)
        raise UserError(f"{folder} was begun with other settings: {told}; restore them, or use another output.path")


def _judge(job: Job, finished: Mapping[int, Unit]) -> None:
    """Raises UserError when too many of the items so far could not be used."""
    c = job.config.rejected
    seen, bad = sum(u.items for u in finished.values()), sum(len(u.rejected) for u in finished.values())
    if bad <= c.most * seen or (seen < c.judged_after and seen < len(job.importer)):
        return
    units.write_rejected(job.folder, [finished[n] for n in sorted(finished)])
    reasons = list(units.reasons(item for u in finished.values() for item in u.rejected).items())[:_DETAILS_SHOWN]
    raise UserError(
        f"{bad} of {seen} items could not be used ({', '.join(f'{reason}: {n}' for reason, n in reasons)}), more than "
        f"rejected.most={c.most:g} allows; see {job.folder / units.REJECTED_FILE}, correct the set, or raise "
        "rejected.most: what is prepared is kept"
    )


@contextmanager
def _quiet_tokenizer() -> Iterator[None]:
    """Long captions are counted instead of being told one by one."""
    logger = logging.getLogger("sdv_jax.models.text.tokenizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# MARK: units


def _do(job: Job, process: tuple[int, int], progress: bool) -> tuple[dict[int, Unit], int]:
    """(all units that are finished then, number of records made): does what is left for this process to do."""
    finished = _undamaged(job, job.finished(), process, progress)
    _judge(job, finished)
    mine = [unit for unit in range(job.units) if unit % process[1] == process[0] and unit not in finished]
    known = {unit.empty_text for unit in finished.values()}
    encoded = 0
    if mine or records.empty_text_sum(job.folder) not in known:
        with _quiet_tokenizer():
            encoded = _encode_units(job, mine, finished, progress)
        finished = job.finished()
    if len(finished) == job.units:
        _describe(job, finished)
    return finished, encoded


def _undamaged(job: Job, finished: Mapping[int, Unit], process: tuple[int, int], progress: bool) -> dict[int, Unit]:
    """`finished` without the units of this process whose records are not what was written."""
    whole, mine = dict(finished), [number for number in finished if number % process[1] == process[0]]
    for number in tqdm(mine, unit="unit", desc="checking what is there", disable=not progress, delay=3):
        if not units.is_whole(job.folder, finished[number], units=job.units):
            del whole[number]
    return whole


def _encode_units(job: Job, mine: Sequence[int], finished: Mapping[int, Unit], progress: bool) -> int:
    """Does the units `mine`; returns the number of records made."""
    c = job.config
    encoders = Encoders.load(
        c.model.path, dtype=c.model.dtype, text_dtype=c.model.text_dtype, embed=c.output.text == "embeddings",
        text_batch=c.work.captions,
    )  # fmt: skip
    known = {unit.empty_text for unit in finished.values()}
    if records.empty_text_sum(job.folder) not in known or not known:
        features = job.features(job.recipe.buckets[0])
        records.write_empty_text(job.folder, encoders.text([""])[0].astype(features["text"].dtype))
    done, made = dict(finished), 0
    indices = [index for unit in mine for index in job.items(unit)]
    bar = tqdm(total=len(indices), unit="item", desc="preparing", disable=not progress, smoothing=0.05)
    with bar, _Decoder(job, indices) as decoded:
        for unit in mine:
            done[unit] = _Work(job, encoders, unit).run(decoded, bar)
            made += sum(map(len, done[unit].keys.values()))
            bar.set_postfix(rejected=sum(len(u.rejected) for u in done.values()))
            _judge(job, done)
    return made


class _Decoder:
    """Items decoded ahead by threads, in order: an iterator of (index, Sample or RejectedItem). FFmpeg and Pillow
    let other threads run, so threads do what processes would, without copying clips between them.
    """

    def __init__(self, job: Job, indices: Sequence[int]):
        self._job, self._todo, self._window = job, iter(indices), deque()
        workers = job.config.work.workers or len(os.sched_getaffinity(0))
        self._pool, self._ahead = ThreadPoolExecutor(workers, thread_name_prefix="decode"), workers + 1

    def __enter__(self) -> Iterator[tuple[int, Sample | RejectedItem]]:
        return self._run()

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self) -> Iterator[tuple[int, Sample | RejectedItem]]:
        while True:
            while len(self._window) < self._ahead and (index := next(self._todo, None)) is not None:
                self._window.append((index, self._pool.submit(_outcome, self._job, index)))
            if not self._window:
                return
            index, future = self._window.popleft()
            yield index, future.result()


def _outcome(job: Job, index: int) -> Sample | RejectedItem:
    key = job.importer.key(index)
    if (other := job.duplicates.earlier(index)) is not None:
        return RejectedItem(key, "duplicate key", f"item {index} has the key of item {other}")
    try:
        return samples.read(job.importer, index, job.recipe)
    except Rejected as rejected:
        return RejectedItem(key, rejected.reason, rejected.detail)


def _usable(importer: Importer, recipe: Recipe, index: int) -> bool:
    try:
        samples.read(importer, index, recipe)
    except Rejected:
        return False
    return True


class _Work:
    """One unit of work."""

    def __init__(self, job: Job, encoders: Encoders, unit: int):
        self._job, self._encoders, self._unit = job, encoders, unit
        self._pending: dict[Size, list[Sample]] = {size: [] for size in job.recipe.buckets}
        self._writers: dict[str, ShardWriter] = {}
        self._keys: dict[str, list[str]] = {}
        self._rejected: list[RejectedItem] = []
        self._left_out: list[RejectedItem] = []
        self._thumbnails: list[Thumbnail] = []
        self._durations: list[float] = []
        self._used: list[float] = []
        self._cut = 0

    def run(self, decoded: Iterator[tuple[int, Sample | RejectedItem]], bar: tqdm) -> Unit:
        """Takes the unit's items from `decoded`, writes its records and says that it is finished."""
        job, start = self._job, time.perf_counter()
        items = job.items(self._unit)
        records.forget(job.folder, self._unit, job.units)
        with ExitStack() as stack:
            for _ in items:
                index, outcome = next(decoded)
                if isinstance(outcome, RejectedItem):
                    self._rejected.append(outcome)
                else:
                    self._take(index, outcome, stack)
                bar.update()
            for size in job.recipe.buckets:
                self._encode(size, stack)
        shards = {name: writer.shard() for name, writer in sorted(self._writers.items())}
        unit = Unit(
            self._unit, job.settings, len(items), {name: tuple(self._keys[name]) for name in shards}, shards,
            tuple(self._rejected), tuple(self._thumbnails), tuple(self._durations), math.fsum(self._used),
            records.empty_text_sum(job.folder), self._cut, time.perf_counter() - start,
            tuple(self._left_out),
        )  # fmt: skip
        units.write(job.folder, unit)
        return unit

    def _take(self, index: int, sample: Sample, stack: ExitStack) -> None:
        job = self._job
        if page.is_shown(index, len(job.importer), job.config.page.thumbnails):
            self._thumbnails.append(self._thumbnail(index, sample))
        if sample.size.frames > 1:
            self._durations.append(round(sample.seconds, 3))
            self._used.append(sample.used)
        self._left_out += [RejectedItem(sample.key, *why) for why in sample.left_out]
        pending = self._pending[sample.size]
        pending.append(sample)
        if len(pending) == self._encoders.video.whole(self._at_once(sample.size)):
            self._encode(sample.size, stack)

    def _thumbnail(self, index: int, sample: Sample) -> Thumbnail:
        views = self._job.recipe.references == "views" or sample.size.frames == 1
        return page.write_thumbnail(self._job.folder, index, sample, self._job.config.page, views=views)

    def _encode(self, size: Size, stack: ExitStack) -> None:
        """Encodes and writes the samples that wait for a bucket, if there are any."""
        found, self._pending[size] = self._pending[size], []
        if not found:
            return
        video, pictures = self._encoders.video, self._job.config.work.pictures
        clips = np.stack([sample.target for sample in found]) if len(found) > 1 else found[0].target[None]
        mean, logvar = video(clips, batch_size=self._at_once(size))
        views = video(np.concatenate([sample.references for sample in found])[:, None], batch_size=pictures)
        reference_mean, reference_logvar = (moment.reshape(len(found), -1, *moment.shape[2:]) for moment in views)
        captions = [sample.caption for sample in found]
        text = self._encoders.text(captions)
        self._cut += self._encoders.text.cuts(captions)
        arrays = dict(
            mean=mean, logvar=logvar, reference_mean=reference_mean, reference_logvar=reference_logvar, text=text
        )
        writer = self._writer(size, stack)
        for i, sample in enumerate(found):
            row = {name: array[i] for name, array in arrays.items()}
            writer.write(row, key=sample.key, caption=sample.caption, provenance=sample.provenance)
            self._keys[bucket_name(size)].append(sample.key)

    def _writer(self, size: Size, stack: ExitStack) -> ShardWriter:
        name, job = bucket_name(size), self._job
        if name not in self._writers:
            writer = ShardWriter(job.folder, name, job.features(size), unit=self._unit, units=job.units)
            self._writers[name], self._keys[name] = stack.enter_context(writer), []
        return self._writers[name]

    def _at_once(self, size: Size) -> int:
        work = self._job.config.work
        return work.clips if size.frames > 1 else work.pictures


# MARK: end


def _describe(job: Job, finished: Mapping[int, Unit]) -> None:
    """Writes what is about the whole: rejected.jsonl, the page, tensorflow-datasets' metadata, and the manifest."""
    done = [finished[number] for number in range(job.units)]
    units.write_rejected(job.folder, done)
    counts = {bucket_name(size): 0 for size in job.recipe.buckets}
    for unit in done:
        for name, keys in unit.keys.items():
            counts[name] += len(keys)
    if not any(counts.values()):
        raise UserError(
            f"none of {len(job.importer)} items could be used; see {job.folder / units.REJECTED_FILE} for the reasons"
        )
    about = {
        "settings": job.config.flat(),
        "source": dict(job.importer.about),
        "items": len(job.importer),
        "records_per_bucket": counts,
        "rejected": units.reasons(item for unit in done for item in unit.rejected),
        "references_left_out": units.reasons(item for unit in done for item in unit.left_out),
        "seconds_of_video": round(math.fsum(unit.used for unit in done), 3),
        "captions_cut": sum(unit.cut_captions for unit in done),
        "seconds_of_work": round(math.fsum(unit.seconds for unit in done), 3),
    }
    page.write(job.folder, about, done)
    buckets = {
        bucket_name(size): (
            dataclasses.astuple(size), job.features(size),
            [unit.shards[bucket_name(size)] for unit in done if bucket_name(size) in unit.shards],
        )
        for size in job.recipe.buckets
        if counts[bucket_name(size)]
    }  # fmt: skip
    records.finish(job.folder, buckets, scale=job.traits.latents, units=job.units, about=about)
