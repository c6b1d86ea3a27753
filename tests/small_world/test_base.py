"""The recipe of the small world's bases, at a size where nothing is learned."""

import dataclasses
import json

import numpy as np
from safetensors.numpy import load_file

from sdv_jax.small_world import base
from sdv_jax.small_world.autoencoder import TINY_WAN_VAE, AutoencoderConfig
from sdv_jax.train import config as configs

SIZES = base.Sizes(autoencoder_clips=4, clips=4, images=4)
VAE = AutoencoderConfig(vae=dataclasses.replace(TINY_WAN_VAE, base_dim=4, decoder_base_dim=4), steps=2, batch_size=1,
                        images=1, warmup=1)  # fmt: skip
SMALL = {
    "model.transformer.num_attention_heads": 2, "model.transformer.attention_head_dim": 12,
    "model.transformer.freq_dim": 16, "model.transformer.ffn_dim": 16, "model.transformer.num_layers": 1,
    "text_to_video.batch_size": 2, "text_to_video.image_batch_size": 1, "train.steps": 2,
}  # fmt: skip


def test_the_second_part_goes_on_from_the_first_in_the_same_workdir(tmp_path):
    weights = {}
    for name in ("small_world_wan_base", "small_world_wan_base_frames"):
        settings = SMALL | ({"model.path": str(tmp_path / "small_world_wan_base"), "train.seed": 7} if weights else {})
        config = configs.load(f"configs/{name}.py", settings)
        base.make(config, tmp_path / "work", tmp_path / name, run=name, autoencoder=VAE, sizes=SIZES)
        weights[name] = load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        assert json.loads((tmp_path / name / "model_index.json").read_text())["expand_timesteps"] is True
    first, second = weights.values()
    moved = {name: np.abs(second[name] - first[name]).max() for name in first}
    assert 0 < max(moved.values()) < 1e-3  # two steps of warm-up, from where the first part ended
    config = json.loads((tmp_path / "work" / "small_world_wan_base_frames" / "config.json").read_text())
    assert config["text_to_video"]["first_frame"] == 0.5
