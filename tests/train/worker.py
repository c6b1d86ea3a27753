"""One process of a small run, for tests that need several, or one that can be killed.

    python -m tests.train.worker WORKDIR SETTINGS_JSON DEVICES tiny|tiny_wan|small_world [PORT COUNT INDEX]

SETTINGS_JSON are dotted config keys: over tests/train/tiny.py's or tiny_wan.py's, or over
configs/small_world_cogvideox.py.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
from jax._src import compilation_cache, compiler

sys.modules["torch"] = None  # tensorboardX imports it where it finds it: seconds for nothing
import tensorboardX  # noqa: E402, F401

del sys.modules["torch"]


def main(workdir: str, settings: str, devices: str, source: str, *job: str) -> int:
    jax.config.update("jax_num_cpu_devices", int(devices))
    compiler._cache_write = _keep_compiled
    from sdv_jax import training
    from sdv_jax.train import config as configs
    from sdv_jax.train import loop
    from tests.train import tiny, tiny_wan

    given = json.loads(settings)
    if source == "small_world":
        config, run = configs.load("configs/small_world_cogvideox.py", given), loop.run
    else:
        family = {"tiny": tiny, "tiny_wan": tiny_wan}[source]
        config = family.config(**given)
        run = partial(loop.run, data=family.rows(config))
    training.train = lambda config, workdir: run(config, Path(workdir), shown=False)
    port, count, index = job or ("", 1, 0)
    coordinator = f"127.0.0.1:{port}" if port else ""
    return training.run_job(config, workdir, coordinator=coordinator, count=int(count), index=int(index))


def _keep_compiled(key: str, seconds: float, name: str, backend, executable, *_) -> None:
    """JAX lets process 0 alone write to its cache, but on CPUs the programs of the others have keys of their own."""
    compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
