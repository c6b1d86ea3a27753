"""A set of clips and pictures in which each item is wrong or odd in its own way, as rows of a metadata.jsonl."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data import clips, sets
from tests.data.pictures import png_claiming

PROMPT = "a red ball on sand"
_FRAMES = 13


def make(folder: Path) -> list[str]:
    """Writes the set; returns the items' names, in the order of the rows."""
    folder.mkdir(parents=True)
    clips.write(folder.parent / "outside.mp4", sets.moving(0, _FRAMES), fps=sets.FPS)
    rows = []
    for name, write in FILES.items():
        write(folder / name)
        rows.append((name, {"video": name, "prompt": PROMPT}))
    for name, row in ROWS.items():
        sound = row if isinstance(row, str) else {"prompt": PROMPT} | row
        if isinstance(sound, dict) and sound.get("video") == name:
            _clip()(folder / name)
        rows.append((name, sound))
    lines = [row if isinstance(row, str) else json.dumps(row) for _, row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return [name for name, _ in rows]


def _clip(frames: int = _FRAMES, height: int = 32, width: int = 48, **how) -> Callable[[Path], object]:
    return lambda path: clips.write(
        path, sets.moving(1, frames, height=height, width=width), **{"fps": sets.FPS} | how
    )


def _noise(path: Path, **how) -> bytes:
    """A clip of much detail, so that its bytes are mostly frames; what was written."""
    frames = np.random.default_rng(0).integers(0, 255, (_FRAMES, 64, 96, 3), np.uint8)
    clips.write(path, frames, fps=sets.FPS, options={"bf": "0"}, **how)
    return path.read_bytes()


def _half(path: Path, **how) -> None:
    content = _noise(path, **how)
    path.write_bytes(content[: len(content) // 2])


def _renamed(suffix: str, write: Callable[[Path], object]) -> Callable[[Path], object]:
    def of(path: Path) -> None:
        write(path.with_suffix(suffix))
        path.with_suffix(suffix).rename(path)

    return of


def _hole(path: Path) -> None:
    """Wrong bytes in the middle, over which the decoder paints and says so."""
    _clip(_FRAMES, height=64, width=96, flags={"movflags": "faststart"}, options={"bf": "0", "crf": "8"})(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(byte ^ 0x55 for byte in content[middle : middle + 40])
    path.write_bytes(content)


def _twice(path: Path) -> None:
    _clip(5)(path)
    path.write_bytes(path.read_bytes() * 2)


def _picture(kind: str = "RGB", **how) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(sets.moving(2, 1)[0]).convert(kind).save(path, **how)


def _sixteen_bits(path: Path) -> None:
    Image.fromarray(sets.moving(2, 1)[0, ..., 0].astype(np.uint16) * 257).save(path)


def _sideways(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(sets.moving(2, 1)[0])).save(path, exif=exif)


def _cut_picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1000])


def _animation(path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in sets.moving(3, _FRAMES)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125)


def _text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


FILES: dict[str, Callable[[Path], object]] = {
    "good.mp4": _clip(),
    "cut.mp4": _half,
    "cut_streamable.mp4": lambda path: _half(path, flags={"movflags": "faststart"}),
    "hole.mp4": _hole,
    "empty.mp4": Path.touch,
    "zero_length.mp4": _clip(0),
    "one_frame.mp4": _clip(1),
    "short.mp4": _clip(8),
    "sound_only.mp4": clips.write_sound,
    "cover_only.mp4": lambda path: clips.write_sound(path, cover=sets.moving(0, 1)[0]),
    "no_frames.gif": lambda path: path.write_bytes(b"GIF89a" + bytes([16, 0, 16, 0, 0, 0, 0]) + b";"),
    "text.mp4": _text("<html>404 not found</html>"),
    "playlist.mp4": _text("#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n"),
    "picture.mp4": _renamed(".png", _picture()),
    "folder.mp4": Path.mkdir,
    "really_mkv.mp4": _renamed(".mkv", _clip()),
    "really_mp4.jpg": _renamed(".mp4", _clip()),
    "backwards.ts": _twice,
    "slide_show.mp4": _clip(4, fps=2),
    "hdr.mp4": _clip(pix_fmt="yuv420p10le", color_trc=16),
    "ten_bits.mp4": _clip(pix_fmt="yuv420p10le"),
    "odd_size.mp4": _clip(height=35, width=51, pix_fmt="yuv444p"),
    "narrow.mp4": _clip(height=16, width=400),
    "sideways.mp4": _clip(height=48, width=32, rotation=90),
    "uneven.mkv": _clip(times=[0, 100, 300, 310, 320, 500, 700, 800, 900, 1000, 1200, 1300, 1400]),
    "thirty_fps.mp4": _clip(45, fps=30),
    "cut.png": _cut_picture,
    "empty.png": Path.touch,
    "text.png": _text("not a picture"),
    "bomb.png": lambda path: path.write_bytes(png_claiming(60000, 60000)),
    "tiny.png": lambda path: Image.new("RGB", (4, 4)).save(path),
    "sixteen_bits.png": _sixteen_bits,
    "cmyk.jpg": _picture("CMYK"),
    "grey.png": _picture("L"),
    "palette.png": _picture("P"),
    "see_through.png": _picture("RGBA"),
    "sideways.jpg": _sideways,
    "animated.gif": _animation,
    "really_jpeg.png": lambda path: _picture(format="JPEG")(path),
    "clip.exe": _clip(container="mp4"),
}
ROWS: dict[str, dict | str] = {
    "no_caption.mp4": {"video": "no_caption.mp4", "prompt": ""},
    "null_caption.mp4": {"video": "null_caption.mp4", "prompt": None},
    "number_as_caption.mp4": {"video": "number_as_caption.mp4", "prompt": 5},
    "long_caption.mp4": {"video": "long_caption.mp4", "prompt": "a red ball " * 909 + "."},
    "half_a_letter.mp4": {"video": "half_a_letter.mp4", "prompt": "lone \ud800"},
    "markup.mp4": {"video": "markup.mp4", "prompt": "<script>alert(1)</script>"},
    "lines.mp4": {"video": "lines.mp4", "prompt": "a red ball\nand a second line\u0000"},
    "not there": {"video": "nowhere.mp4"},
    "a path out of the set": {"video": "../outside.mp4"},
    "an absolute path": {"video": os.path.realpath("/etc/hosts")},
    "no file named": {},
    "a list as file": {"video": ["good.mp4"]},
    "a name of 5,000 letters": {"video": "w" * 5000},
    "a zero byte in the name": {"video": "good.mp4\u0000"},
    "the first file again": {"video": "good.mp4"},
    "the first file in another spelling": {"video": "./good.mp4"},
    "a list as row": '["good.mp4", "a red ball"]',
    "a row with a number of 5,000 digits": '{"video": "good.mp4", "prompt": "a red ball", "n": ' + "1" * 5000 + "}",
    "half a row": '{"video": "good.mp4", "pro',
}
