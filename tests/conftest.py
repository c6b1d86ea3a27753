"""The small pipelines of many tests."""

import pytest

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
