"""Half precision: what diffusers keeps in float32 stays so here, and neither is further from float32 than the other."""

import json

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from sdv_jax.checkpoints import model_folder
from sdv_jax.pipeline import load_pipeline
from sdv_jax.sharding import dotted
from tests.tiny_wan import DEFAULTS, make_pipeline


def test_time_and_modulation_stay_exact(tmp_path):
    make_pipeline("t2v").save_pretrained(tmp_path)
    (tmp_path / "defaults.json").write_text(json.dumps(DEFAULTS))
    module = model_folder.load_component(tmp_path, "transformer", "bfloat16")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    kept = {path for path, leaf in nnx.to_flat_state(nnx.state(module)) if leaf.dtype == jnp.float32}
    expected = {name for name, value in theirs.named_parameters() if value.dtype == torch.float32}
    assert {"scale_shift_table", "condition_embedder.time_embedder.linear_1.kernel"} <= {dotted(p) for p in kept}
    stacked = {name.replace("blocks.0.", "blocks.") for name in expected if "blocks.1" not in name}
    assert {name.rpartition(".")[0] for name in stacked} == {dotted(path).rpartition(".")[0] for path in kept}
    rng = np.random.default_rng(0)
    latents, text = (rng.normal(size=size).astype(np.float32) for size in [(1, 3, 4, 6, 4), (1, 9, 16)])
    time = np.array([612.0], np.float32)
    exact = np.asarray(load_pipeline(tmp_path, progress=False).denoise(latents, text, time))
    half = load_pipeline(tmp_path, dtype="bfloat16", progress=False)
    ours = np.asarray(half.denoise(latents, text, time), np.float32)
    with torch.no_grad():
        first = torch.from_numpy(np.moveaxis(latents, -1, 1).copy()).bfloat16()
        found = theirs(first, torch.from_numpy(time), torch.from_numpy(text).bfloat16()).sample
    peer = np.moveaxis(found.float().numpy(), 1, -1)
    assert np.abs(ours - exact).mean() < 1.5 * np.abs(peer - exact).mean()
