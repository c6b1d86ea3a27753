"""Shape annotations are checked while tests run, where beartype is installed; and the small pipelines of many tests."""

import importlib.util

import pytest

if importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    import tests.typechecker  # noqa: F401  the hook looks it up by name

    packages = ["nn", "models", "adapters"]
    install_import_hook([f"sdv_jax.{name}" for name in packages], "tests.typechecker.check")


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
