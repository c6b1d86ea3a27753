"""Subject-driven video generation in JAX: a picture of a subject and a prompt become a video of that subject.

    pipe = sdv_jax.load_pipeline("model", adapter="adapter")
    video = pipe("a <cls> subject drifting left over sand", reference="subject.png")

Importing this package reads no file, starts no device and imports neither jax nor torch: names are fetched when used.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load_pipeline": "sdv_jax.pipeline",
    "Pipeline": "sdv_jax.pipeline",
    "UserError": "sdv_jax.errors",
}

__all__ = ["Pipeline", "UserError", "__version__", "load_pipeline"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'sdv_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
