"""The tables of names against diffusers' own readers of original files, which know nothing of the published lists."""

import pytest

utils = pytest.importorskip("diffusers.loaders.single_file_utils")

from sdv_jax.models.wan import original_names  # noqa: E402
from tests import published  # noqa: E402

TRANSFORMERS = [name for name in published.ORIGINALS if name.endswith("transformer")]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name):
    originals = {tensor: tensor for tensor in published.original(name)}
    converted = utils.convert_wan_transformer_to_diffusers(dict(originals))
    assert converted == {original_names.diffusers_name(tensor): tensor for tensor in originals}


def test_vae21():
    originals = {tensor: tensor for tensor in published.original("Wan2.1_VAE.pth")}
    converted = utils.convert_wan_vae_to_diffusers(dict(originals))
    table = original_names.vae21()
    assert converted == {table.diffusers(tensor): tensor for tensor in originals}
