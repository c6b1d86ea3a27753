"""The captions of the small world: one sentence per scene, and the parser that reads it back.

    a [<cls>] subject [MOTION] over BACKGROUND        "a <cls> subject drifting left over sand", "a subject over snow"

Each motion has a canonical wording, the first, and one synonym. The marker `<cls>` stands before the noun where a
reference image is meant (the paper's special token); still pictures name no motion.
"""

import dataclasses
import re

import numpy as np

from sdv_jax.errors import UserError
from sdv_jax.small_world.backgrounds import BACKGROUNDS
from sdv_jax.small_world.world import Scene

MARKER = "<cls>"
WORDINGS: dict[str, tuple[str, ...]] = {
    "resting": ("resting", "staying still"),
    "drifting left": ("drifting left", "moving left"),
    "drifting right": ("drifting right", "moving right"),
    "rising": ("rising", "moving up"),
    "sinking": ("sinking", "moving down"),
}
_MOTION_OF = {wording: motion for motion, wordings in WORDINGS.items() for wording in wordings}
_SENTENCE = re.compile(rf"an? (?P<marker>{MARKER} )?subject(?: (?P<motion>[a-z ]+?))? over (?P<background>[a-z]+)\.?")


@dataclasses.dataclass(frozen=True)
class Words:
    """What a caption says. `motion` is None for a still picture."""

    background: str
    motion: str | None = None
    marked: bool = False


def caption(words: Words | Scene, *, marked: bool | None = None, rng: np.random.Generator | None = None) -> str:
    """The sentence for words or a scene; `marked` puts the `<cls>` marker, `rng` draws the wording."""
    if marked is None:
        marked = isinstance(words, Words) and words.marked
    wording = ""
    if words.motion is not None:
        wordings = WORDINGS[words.motion]
        wording = " " + wordings[0 if rng is None else int(rng.integers(len(wordings)))]
    return f"a {MARKER + ' ' if marked else ''}subject{wording} over {words.background}"


def parse(text: str) -> Words:
    """The words of a caption; raises UserError for a sentence outside the grammar."""
    found = _SENTENCE.fullmatch(" ".join(text.lower().split()))
    if found is None:
        expected = f"'a [{MARKER}] subject [MOTION] over BACKGROUND'"
        raise UserError(f"small world: cannot read caption {text!r}; expected {expected}")
    background, motion = found["background"], found["motion"]
    if background not in BACKGROUNDS:
        names = ", ".join(BACKGROUNDS)
        raise UserError(f"small world: unknown background {background!r} in {text!r}; use one of {names}")
    if motion is not None and motion not in _MOTION_OF:
        names = ", ".join(_MOTION_OF)
        raise UserError(f"small world: unknown motion {motion!r} in {text!r}; use one of {names}")
    return Words(background, _MOTION_OF.get(motion), found["marker"] is not None)


def all_captions() -> list[str]:
    """Every sentence of the grammar, in a fixed order."""
    motions = [None, *_MOTION_OF]
    return [
        f"a {marker}subject{' ' + motion if motion else ''} over {background}"
        for marker in ("", MARKER + " ") for motion in motions for background in BACKGROUNDS
    ]
