"""One process of a tiny run, for tests that need several, or one that can be killed.

    python -m tests.train.worker WORKDIR SETTINGS_JSON DEVICES [PORT COUNT INDEX]

SETTINGS_JSON are dotted config keys over tests/train/tiny.py's, with "family" for which tiny model.
"""

import json
import sys
from pathlib import Path

import jax


def main(workdir: str, settings: str, devices: str, *job: str) -> int:
    jax.config.update("jax_num_cpu_devices", int(devices))
    from sdv_jax import training
    from sdv_jax.train import loop
    from tests.train import tiny, tiny_wan

    given = json.loads(settings)
    family = {"cogvideox": tiny, "wan": tiny_wan}[given.pop("family", "cogvideox")]
    config = family.config(**given)
    training.train = lambda config, workdir: loop.run(config, Path(workdir), data=family.rows(config), shown=False)
    port, count, index = job or ("", 1, 0)
    coordinator = f"127.0.0.1:{port}" if port else ""
    return training.run_job(config, workdir, coordinator=coordinator, count=int(count), index=int(index))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
