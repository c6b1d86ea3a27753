"""Shape annotations are checked while tests run, where beartype is installed; and the small pipelines of many tests.

Programs are compiled in a hurry, and kept for the session: most of a test's time is compiling, and its models are too
small to gain by more of it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as users do, in four times the time.
"""

import importlib.metadata
import importlib.util
import os
import tempfile

import pytest

_compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # one per worker: JAX writes such files in several goes
os.environ |= {  # read when jax is imported, by the processes that tests start too
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_hurried = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
if _hurried and importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends it
    # Kernels of LLVM's language at once, without MLIR in between: half the time.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    import tests.typechecker  # noqa: F401  the hook looks it up by name

    packages = ["nn", "models", "adapters"]
    install_import_hook([f"sdv_jax.{name}" for name in packages], "tests.typechecker.check")


def pytest_collection_modifyitems(items):
    """The file that takes minutes by itself comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory):
    """A function: rope -> a diffusers pipeline folder (float32), made once per session. Copy it before changing it."""
    folders = {}

    def folder(rope: bool = True):
        if rope not in folders:
            from tests.tiny_pipeline import save_pipeline

            folders[rope] = save_pipeline(tmp_path_factory.mktemp("pipelines") / f"rope_{rope}", rotary=rope)
        return folders[rope]

    return folder
