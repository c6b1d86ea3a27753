"""Prepares data: python launch/prepare.py --config FILE [--process I/N] [--config.KEY=VALUE ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags  # noqa: E402

from sdv_jax import cli  # noqa: E402
from sdv_jax.data import prepare, settings  # noqa: E402

flags.DEFINE_string(
    "config",
    None,
    "Python file that makes the configuration; --config.SECTION.KEY=VALUE changes one key.",
    required=True,
)
flags.DEFINE_string("process", None, "I/N: which of N processes this is; absent: as SLURM or JAX say, else 0/1.")


def main(arguments: list[str]) -> int:
    def run() -> None:
        config = settings.load(flags.FLAGS.config, arguments[1:])
        process = prepare.this_process(flags.FLAGS.process)
        print(prepare.tell(prepare.prepare(config, process=process), config))

    return cli.guarded(run)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda arguments: flags.FLAGS(arguments, known_only=True))
