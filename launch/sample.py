"""One video from a model, a prompt and pictures of a subject.

    python launch/sample.py --model DIR --prompt TEXT --out VIDEO.mp4

The same as `sdv sample`; `--help` lists every option.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdv_jax import cli  # noqa: E402

if __name__ == "__main__":
    sys.exit(cli.main(["sample", *sys.argv[1:]]))
