"""Trains: python launch/train.py --config configs/small_world_cogvideox.py --workdir runs/x [--config.KEY=VALUE ...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags  # noqa: E402

from sdv_jax import cli, training  # noqa: E402
from sdv_jax.train import config as configs  # noqa: E402

flags.DEFINE_string(
    "config",
    None,
    "Python file that makes the configuration; --config.SECTION.KEY=VALUE changes one key.",
    required=True,
)
flags.DEFINE_string("coordinator", "", "Several processes: HOST:PORT of the first one, or auto on a cluster.")
flags.DEFINE_integer("processes", None, "How many processes there are, with --coordinator HOST:PORT.")
flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
flags.DEFINE_string("workdir", None, "Folder of the run; a run that is already there is resumed.", required=True)


def main(arguments: list[str]) -> int:
    given = flags.FLAGS

    def train() -> int:
        config = configs.load(given.config, arguments[1:])
        return training.run_job(
            config, given.workdir, coordinator=given.coordinator, count=given.processes, index=given.process
        )

    return cli.guarded(train)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda arguments: flags.FLAGS(arguments, known_only=True))
