"""The page of the reproduction: tables, pictures and the numbers of every finding, from the raw scores that are in.

    python -m sdv_jax.small_world.reproduction_report [--results docs/reproduction] [--clips runs/reproduction]

Writes table.md, summary.json and the pictures into `--out`, and, where the page `OUT.md` exists, what stands between
its markers `<!-- begin NAME -->` and `<!-- end NAME -->`; the rest of the page is written by hand.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sdv_jax.data.files import make_folder, replacing
from sdv_jax.errors import UserError
from sdv_jax.small_world import demo
from sdv_jax.small_world import reproduction_figures as figures
from sdv_jax.small_world.reproduction import RESULTS, ROWS
from sdv_jax.small_world.reproduction_figures import MAIN, TITLES
from sdv_jax.small_world.reproduction_measures import MEASURES, Family, common, read
from sdv_jax.train import analysis

DASH = "–"
# Paper A's rows, each number under our measure of the same intent. Its ablations fit CogVideoX; p = 0.4 and 0.6 are of
# its first version.
PAPER = {
    "cogvideox": {
        "full": {"identity": 62.88, "moves": 69.64, "prompt": 32.69, "clean": 98.45},
        "image-only": {"identity": 43.19, "moves": 0.84, "prompt": 32.67, "clean": 99.60},
        "two-stage": {"identity": 76.13, "moves": 81.51, "prompt": 28.96, "clean": 96.04},
        "no-reference-in-motion": {"identity": 48.68, "moves": 44.14, "prompt": 33.41, "clean": 98.85},
        "p-0.4": {"identity": 56.60, "moves": 59.12},
        "p-0.6": {"identity": 62.84, "moves": 60.87},
    },
    "wan": {"full": {"identity": 60.18, "moves": 66.67, "prompt": 32.38, "clean": 98.53}},
}
BESIDE = tuple(name for name, measure in MEASURES.items() if measure.paper)  # columns next to the paper's
OURS = tuple(name for name in MEASURES if name not in BESIDE)
FINDINGS = {  # part of the page -> (row held against the full recipe, measures)
    "image-only": ("image-only", ("moves", "speed", "motion", "prompt", "clean", "identity", "owed")),
    "no-reference": ("no-reference-in-motion", ("identity", "owed", "wrong", "moves", "prompt", "clean")),
    "copying": ("first-frame-no-drop", ("ground", "nearer", "prompt", "identity", "owed", "moves")),
    "two-stage": ("two-stage", ("identity", "owed", "prompt", "moves", "clean")),
    "video-only": ("video-only", ("identity", "owed", "moves", "prompt", "clean", "nearer")),
}
# Setting of one key -> (row, paper A's DINO-I and dynamic degree; p from its first version).
MIXES = {
    "0": ("image-only", "43.19", "0.84"), "0.2": ("full", "59.29", "60.19"), "0.4": ("p-0.4", "56.60", "59.12"),
    "0.6": ("p-0.6", "62.84", "60.87"), "1": ("video-only", DASH, DASH),
}  # fmt: skip
RANKS = {"4": "rank-4", "16": "rank-16", "32": "full", "64": "rank-64"}


def report(results: Path, clips: Path, out: Path) -> list[Path]:
    """Writes everything from what is in, and returns the files written.

    Raises UserError for a damaged record, records of different settings, a page without a marker, a place that cannot
    be written.
    """
    make_folder(out, what="report")
    records = {name: read(results, name) for name in demo.SHIPPED}
    families = {name: Family(rows) for name, rows in records.items() if rows}
    written = _pictures(families, clips, out)
    parts = _parts(families, out)
    page = out.parent / f"{out.name}.md"
    texts = {
        out / "table.md": "\n\n".join([parts["runs"], parts["table"]]) + "\n",
        out / "summary.json": json.dumps(summary(families), indent=1) + "\n",
    }
    if page.is_file():
        texts[page] = filled(page.read_text(), parts, where=page)
    for path, text in texts.items():
        with replacing(path, what="report") as temporary:
            temporary.write_text(text)
    return [*written, *texts]


def filled(text: str, parts: Mapping[str, str], *, where: Path) -> str:
    """The page with what stands between its markers replaced; every part must have its place, and no other."""
    names = re.findall(r"<!-- begin ([\w-]+) -->", text)
    if sorted(names) != sorted(parts):
        odd = sorted(set(names) ^ set(parts)) or sorted(name for name in parts if names.count(name) > 1)
        raise UserError(f"reproduction: {where} should have one '<!-- begin {odd[0]} -->' per part; see {RESULTS}.md")
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if text.count(end) != 1 or text.index(end) < text.index(begin):
            raise UserError(f"reproduction: {where} has no '{end}' after its begin; put it where the part should end")
        text = text[: text.index(begin)] + f"{begin}\n{part}\n{end}" + text[text.index(end) + len(end) :]
    return text


def summary(families: Mapping[str, Family]) -> dict:
    """All numbers of the page: per family and row every measure in percent, its difference from the full recipe, and
    the gradients' cosine and norms.
    """
    found = {}
    for name, family in families.items():
        rows = {row: _summed(family, row) for row in ("base", "truth", *family.records)}
        spreads = {measure: family.seed_spread(measure) for measure in MEASURES}
        found[name] = {"rows": rows, "seed_spread": spreads, "runs": sum(map(len, family.records.values()))}
    return {"runs_of_a_family": _wanted(), "families": found}


def _summed(family: Family, row: str) -> dict:
    told: dict[str, object] = {}
    for measure in MEASURES:
        estimate, difference = family.estimate(row, measure), family.difference(row, measure)
        if estimate is not None:
            told[measure] = {"value": estimate.value, "error": estimate.error, "seeds": estimate.seeds}
            if difference is not None and row not in ("full", "base", "truth"):
                told[measure] |= {"difference": difference.value, "difference_error": difference.error}
    if row in family.records:
        told["gradients"] = _gradients([record["gradients"] for record in family.records[row]])
    return told


def _gradients(seeds: Sequence[Sequence[dict]]) -> dict[str, list[float]]:
    """Per seed: the cosine at first, its median, lowest and highest of the last quarter; medians then of the norms, and
    of the cosine between the halves of each task's rows.
    """
    ends = [[record["cosine"] for record in analysis.last_quarter(records)] for records in seeds]
    return {
        "first": [records[0]["cosine"] for records in seeds],
        "late": [analysis.late(records, "cosine") for records in seeds],
        "lowest": [min(cosines) for cosines in ends],
        "highest": [max(cosines) for cosines in ends],
        "norm_identity": [analysis.late(records, "norm_identity") for records in seeds],
        "norm_motion": [analysis.late(records, "norm_motion") for records in seeds],
        "halves_identity": [analysis.late(records, "halves_identity") for records in seeds],
        "halves_motion": [analysis.late(records, "halves_motion") for records in seeds],
    }


# MARK: parts of the page


def _pictures(families: Mapping[str, Family], clips: Path, out: Path) -> list[Path]:
    if not families:
        return []
    written = [out / "dynamics.png", out / "ablations.png"]
    figures.dynamics(families, written[0])
    figures.ablations(families, written[1])
    for name, family in families.items():
        if any(row in family.records for row in MAIN):
            figures.gradients(family, name, out / f"gradients_{name}.png")
            written.append(out / f"gradients_{name}.png")
        if figures.sheet(family, name, clips, out / f"sheet_{name}.png"):
            written.append(out / f"sheet_{name}.png")
    return written


def _parts(families: Mapping[str, Family], out: Path) -> dict[str, str]:
    """Every generated part of the page by its name."""
    by_family = [f"gradients_{name}.png" for name in demo.SHIPPED], [f"sheet_{name}.png" for name in demo.SHIPPED]
    parts = {"runs": _runs(families), "table": "\n\n".join(_table(families.get(name), name) for name in demo.SHIPPED)}
    parts |= {name: _finding(families, row, measures) for name, (row, measures) in FINDINGS.items()}
    parts["gradients"] = _gradient_table(families)
    parts["p"] = _mixes(families)
    parts["rank"] = _ranks(families)
    shown = {"overview": ["ablations.png", "dynamics.png"], "gradient-plots": by_family[0], "sheets": by_family[1]}
    return parts | {name: _shown(files, out) for name, files in shown.items()}


def _wanted() -> int:
    return sum(row.seeds for row in ROWS.values())


def _runs(families: Mapping[str, Family]) -> str:
    """How many runs are in, which are not, and with what settings."""
    counts, lines = [], []
    for name in demo.SHIPPED:
        records = families[name].records if name in families else {}
        counts.append(f"{TITLES[name]} {sum(map(len, records.values()))} of {_wanted()}")
        absent = [(row, ROWS[row].seeds - len(records.get(row, ()))) for row in ROWS]
        told = ", ".join(f"{row} {count}" for row, count in absent if count)
        if told and records:
            lines.append(f"- Not in yet, {TITLES[name]}, runs of each row: {told}.")
    for name, family in families.items():
        row, records = next(iter(family.records.items()))
        told = ", ".join(f"`{key}` {value}" for key, value in common(records[0], row).items())
        lines.append(f"- {TITLES[name]}: {told}.")
    total = sum(sum(map(len, family.records.values())) for family in families.values())
    return "\n".join([f"**{total} of {_wanted() * len(demo.SHIPPED)} runs are in** ({', '.join(counts)}).", "", *lines])


def _table(family: Family | None, name: str) -> str:
    """A family's two tables: what has a metric of the paper beside it, and the rest."""
    title = f"### {TITLES[name]}"
    if family is None:
        return f"{title}\n\nNot in yet."
    beside = ["row", "seeds"]
    for measure in BESIDE:
        beside += [MEASURES[measure].title, f"*paper: {MEASURES[measure].paper}*"]
    rows = ("base", "truth", *ROWS)
    first = [
        [row, _seeds(family, row), *(cell for m in BESIDE for cell in (_cell(family, row, m), _paper(name, row, m)))]
        for row in rows
    ]
    second = [[row, *(_cell(family, row, measure) for measure in OURS)] for row in rows]
    return "\n\n".join([title, _grid(beside, first), _grid(["row", *(MEASURES[m].title for m in OURS)], second)])


def _seeds(family: Family, row: str) -> str:
    if row in ROWS:
        return f"{len(family.records.get(row, ()))}/{ROWS[row].seeds}"
    return ""


def _cell(family: Family | None, row: str, measure: str) -> str:
    """Value ± standard error, bold where it differs from the full recipe's by more than noise."""
    estimate = None if family is None else family.estimate(row, measure)
    if estimate is None:
        return DASH
    text = f"{estimate.value:.1f} ± {estimate.error:.1f}"
    difference = family.difference(row, measure) if row in ROWS and row != "full" else None
    return f"**{text}**" if difference is not None and difference.told != "within noise" else text


def _paper(name: str, row: str, measure: str) -> str:
    number = PAPER[name].get(row, {}).get(measure)
    return f"*{number:.2f}*" if number is not None else DASH


def _finding(families: Mapping[str, Family], row: str, measures: Iterable[str]) -> str:
    """A row against the full recipe, measure by measure, both families."""
    lines = []
    for name in demo.SHIPPED:
        family = families.get(name)
        for measure in measures:
            difference = None if family is None else family.difference(row, measure)
            told = [DASH, "not in yet"]
            if difference is not None:
                told = [f"{difference.value:+.1f} ± {difference.error:.1f}", difference.told]
            cells = [_cell(family, "full", measure), _cell(family, row, measure).strip("*")]
            lines.append([TITLES[name], MEASURES[measure].title, *cells, *told])
    return _grid(["family", "measure", "full", row, "difference", "reads"], lines)


def _gradient_table(families: Mapping[str, Family]) -> str:
    lines = []
    for name in demo.SHIPPED:
        for row in MAIN:
            records = families[name].records.get(row, ()) if name in families else ()
            if not records:
                lines.append([TITLES[name], row, *[DASH] * 6, "not in yet"])
                continue
            told = _gradients([record["gradients"] for record in records])
            band = f"{min(told['lowest']):.2f} … {max(told['highest']):.2f}"
            norms = (_mean(told[key], digits=3) for key in ("norm_identity", "norm_motion"))
            halves = (_mean(told[key]) for key in ("halves_identity", "halves_motion"))
            lines.append([TITLES[name], row, _mean(told["first"]), _mean(told["late"]), band, *norms, *halves])
    head = [
        "family", "row", "cosine at step 0", "median, last quarter", "its band", "norm identity", "norm motion",
        "halves, identity", "halves, motion",
    ]  # fmt: skip
    return _grid(head, lines)


def _mean(values: Sequence[float], *, digits: int = 2) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else mean


def _mixes(families: Mapping[str, Family]) -> str:
    measures = ("identity", "owed", "moves", "clean")
    head = ["p", *_heads(measures), "*paper: DINO-I*", "*paper: dynamic degree*"]
    return _grid(head, [[p, *_line(families, row, measures), dino, moves] for p, (row, dino, moves) in MIXES.items()])


def _ranks(families: Mapping[str, Family]) -> str:
    measures = ("identity", "owed", "moves", "clean")
    return _grid(["rank", *_heads(measures)], [[rank, *_line(families, row, measures)] for rank, row in RANKS.items()])


def _heads(measures: Sequence[str]) -> list[str]:
    return [f"{TITLES[name]}: {MEASURES[measure].title}" for name in demo.SHIPPED for measure in measures]


def _line(families: Mapping[str, Family], row: str, measures: Sequence[str]) -> list[str]:
    return [_cell(families.get(name), row, measure) for name in demo.SHIPPED for measure in measures]


def _shown(files: Iterable[str], out: Path) -> str:
    there = [f"![{Path(name).stem}]({out.name}/{name})" for name in files if (out / name).is_file()]
    return "\n\n".join(there) or "Not in yet."


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the runs left FAMILY/ROW-SEED.json")
    parser.add_argument("--clips", type=Path, default=demo.ROOT / "runs" / "reproduction", help="the runs' workdir")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        for path in report(arguments.results, arguments.clips, arguments.out):
            print(path)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
