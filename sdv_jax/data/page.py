"""DIR/index.html: a prepared dataset to look at. One file with everything in it, no script and no network."""

import base64
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdv_jax.data.files import replacing
from sdv_jax.data.samples import Sample, bucket_name
from sdv_jax.data.settings import Page
from sdv_jax.data.units import RejectedItem, Thumbnail, Unit

THUMBNAILS = "thumbnails"
_QUALITY = 80  # of JPEG
_MOST_VIEWS = 3  # references shown of a sample
_GAP = 3  # pixels between frames
_EXAMPLES = 5  # rejected items shown per reason
_CAPTION = 400  # characters shown
_BINS = 12  # bars of the histogram of durations

_STYLE = """
:root { --ink: #1c2024; --soft: #60646c; --line: #e0e3e8; --card: #fff; --ground: #f6f7f9; --bar: #3d63dd;
        --bad: #ce2c31 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --card: #212225; --ground: #18191b; --bar: #849dff;
          --bad: #ff9592 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 28px; margin: 0 }
h2 { font-size: 18px; margin: 40px 0 12px }
.soft { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 12px 16px }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 0 40px }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 500; color: var(--soft) }
td, th { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1% }
td.bar { width: 45%; vertical-align: middle }
td.bar i { display: block; height: 12px; border-radius: 3px; background: var(--bar); min-width: 1px }
td.bad i { background: var(--bad) }
.cards { display: flex; flex-wrap: wrap; gap: 16px }
.card { overflow: hidden; max-width: 100%; flex: 1 1 auto }
.card .strips { display: flex; flex-wrap: wrap; gap: 10px; padding: 10px 10px 0 }
.card figure { margin: 0 }
.card figcaption { font-size: 12px; color: var(--soft) }
.card img { display: block; max-width: 100%; height: auto; border-radius: 4px }
.card p { margin: 8px 12px; contain: inline-size; overflow-wrap: anywhere }
.card .from { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; contain: inline-size }
details { margin: 4px 0 } summary { cursor: pointer }
li { overflow-wrap: anywhere }
code { font: 13px ui-monospace, monospace }
"""


def is_shown(index: int, items: int, most: int) -> bool:
    """Whether an item is one of the `most` that are spread evenly over the set."""
    return most > 0 and index % max(1, math.ceil(items / most)) == 0


def write_thumbnail(folder: Path, index: int, sample: Sample, settings: Page, *, views: bool) -> Thumbnail:
    """Frames of a sample as a JPEG in DIR/thumbnails, and its references as another with `views`."""
    names = [f"{index:08d}.jpg", ""]
    _save(folder, names[0], _spread(sample.target, settings.frames), settings.height)
    if views:
        names[1] = f"{index:08d}_views.jpg"
        _save(folder, names[1], sample.references[:_MOST_VIEWS], settings.height)
    caption = sample.caption if len(sample.caption) <= _CAPTION else f"{sample.caption[:_CAPTION]} …"
    return Thumbnail(sample.key, caption, bucket_name(sample.size), sample.seconds, *names)


def write(folder: Path, about: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Writes DIR/index.html; `about` is what the manifest says."""
    kept, items = sum(about["records_per_bucket"].values()), about["items"]
    title = html.escape(folder.resolve().name)
    shown = [thumbnail for unit in units for thumbnail in unit.thumbnails]
    rejected, left_out = ([i for unit in units for i in getattr(unit, name)] for name in ("rejected", "left_out"))
    parts = [
        f"<h1>{title}</h1>",
        f'<div class="soft">{_origin(about)}</div>',
        _tiles(about, kept),
        '<div class="columns">',
        _section("Sizes (frames × height × width)", _bars(about["records_per_bucket"])),
        _section("Length of the source clips", _bars(_histogram([d for unit in units for d in unit.durations]))),
        "</div>",
        _section(f"Set aside: {items - kept} of {items}", _rejected(about["rejected"], rejected)),
        _section("References left out of records with others", _reasons(about["references_left_out"], left_out)),
        _section(f"Samples: {len(shown)} of {kept}", _cards(folder, shown)),
        _section("Settings", _settings(about["settings"])),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    with replacing(folder / "index.html", what="page") as temporary:
        temporary.write_text(
            f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n'
            + "\n".join(parts) + "\n</body></html>\n", "utf-8",
        )  # fmt: skip


def _origin(about: Mapping[str, Any]) -> str:
    settings = about["settings"]
    return (
        f"{html.escape(settings['source.format'])} set <code>{html.escape(settings['source.path'])}</code>, encoded by "
        f"<code>{html.escape(settings['model.path'])}</code>"
    )


def _tiles(about: Mapping[str, Any], kept: int) -> str:
    rate = kept / about["seconds_of_work"] if about["seconds_of_work"] else 0
    tiles = {
        "records": f"{kept:,}",
        "set aside": f"{100 * (about['items'] - kept) / about['items']:.1f} %",
        "of video used": _time(about["seconds_of_video"]),
        "samples per second and process": f"{rate:.2f}",
        "captions cut to the text length": f"{about['captions_cut']:,}",
    }
    shown = "".join(_tile(name, told) for name, told in tiles.items() if told not in ("0", "0.0 s"))
    return f'<div class="tiles">{shown}</div>'


def _tile(name: str, told: str) -> str:
    return f'<div class="tile"><b>{told}</b><span class="soft">{name}</span></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _bars(counts: Mapping[str, int], kind: str = "") -> str:
    """A table of counts with a bar each."""
    most = max(counts.values(), default=0)
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{n:,}</td>'
        f'<td class="bar {kind}">{f"<i style=width:{100 * n / most:.1f}%></i>" if n else ""}</td></tr>'
        for name, n in counts.items()
    )
    return f"<table>{rows}</table>" if rows else ""


def _histogram(durations: Sequence[float]) -> dict[str, int]:
    """Counts of durations in up to `_BINS` equal steps of 1, 2 or 5 times a power of ten seconds."""
    if not durations:
        return {}
    longest = max(durations)
    step = next(m * 10.0**e for e in itertools.count(-3) for m in (1, 2, 5) if longest < _BINS * m * 10.0**e)
    counts = np.bincount(np.floor(np.asarray(durations) / step).astype(int))
    first = int(np.flatnonzero(counts)[0])
    return {f"{i * step:g} to {(i + 1) * step:g} s": int(counts[i]) for i in range(first, len(counts))}


def _rejected(reasons: Mapping[str, int], items: Sequence[RejectedItem]) -> str:
    if not reasons:
        return '<p class="soft">Nothing: every item could be used.</p>'
    return _reasons(reasons, items) + "<p class=soft>All of them are in rejected.jsonl.</p>"


def _reasons(reasons: Mapping[str, int], items: Sequence[RejectedItem]) -> str:
    """Counts, and a few examples of each; "" where there is nothing."""
    if not reasons:
        return ""
    examples = {reason: [] for reason in reasons}
    for item in items:
        if len(examples[item.reason]) < _EXAMPLES:
            examples[item.reason].append(item)
    told = "".join(
        f"<details><summary>{html.escape(reason)} ({reasons[reason]:,})</summary><ul>"
        + "".join(f"<li><code>{html.escape(i.key)}</code> {html.escape(i.detail)}</li>" for i in found)
        + "</ul></details>"
        for reason, found in examples.items()
    )
    return _bars(reasons, "bad") + f"<p class=soft>Examples:</p>{told}"


def _cards(folder: Path, shown: Sequence[Thumbnail]) -> str:
    cards = []
    for thumbnail in shown:
        views = _figure(folder, thumbnail.views, "references") if thumbnail.views else ""
        length = f", {thumbnail.seconds:.1f} s" if thumbnail.seconds else ""
        cards.append(
            f'<article class="card"><div class="strips">{views}'
            f"{_figure(folder, thumbnail.file, 'target' if views else '')}</div>"
            f"<p>{html.escape(thumbnail.caption)}</p>"
            f'<p class="from"><code>{html.escape(thumbnail.key)}</code> · {thumbnail.bucket}{length}</p></article>'
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _figure(folder: Path, name: str, title: str) -> str:
    path = folder / THUMBNAILS / name
    if not path.is_file():
        return '<figure class="soft">thumbnail missing</figure>'
    told = f"<figcaption>{title}</figcaption>" if title else ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure>{told}<img alt="" loading="lazy" src="data:image/jpeg;base64,{data}"></figure>'


def _settings(settings: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(key)}</code></td><td><code>{html.escape(repr(found))}</code></td></tr>"
        for key, found in settings.items()
    )
    return f"<details><summary>What decided the contents</summary><table>{rows}</table></details>"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _spread(frames: np.ndarray, count: int) -> np.ndarray:
    return frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]


def _save(folder: Path, name: str, frames: np.ndarray, height: int) -> None:
    """Frames side by side."""
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    strip = Image.new("RGB", (len(frames) * (width + _GAP) - _GAP, height), "white")
    for i, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (i * (width + _GAP), 0))
    with replacing(folder / THUMBNAILS / name, what="thumbnail") as temporary:
        strip.save(temporary, format="JPEG", quality=_QUALITY)
