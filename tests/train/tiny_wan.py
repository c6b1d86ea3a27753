"""tests/train/tiny.py's settings on Wan: other tables, and one line for the family."""

import dataclasses

from sdv_jax.data.latents import LatentDataset
from sdv_jax.train import config as configs
from sdv_jax.train import setup
from tests.train import tiny

TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 8, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip
VAE = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True], "scale_factor_spatial": 4,
    "latents_mean": [0.5, 0.0, -0.5, 0.1], "latents_std": [2.0, 1.0, 0.5, 1.0],
}  # fmt: skip


def config(**overrides) -> configs.Config:
    """configs/base.py at this size; overrides are SECTION__KEY=VALUE or dotted keys."""
    settings = {
        "train.steps": 6, "train.save_every": 100, "identity.batch_size": 4, "motion.batch_size": 4, "lora.rank": 2,
        "lora.alpha": 2.0, "lora.dropout": 0.0, "optimizer.learning_rate": 1e-2, "optimizer.warmup": 2,
        "switch.motion_probability": 0.4, "model.family": "wan",
    }  # fmt: skip
    settings |= {f"model.transformer.{key}": value for key, value in TRANSFORMER.items()}
    settings |= {f"model.vae.{key}": value for key, value in VAE.items()}
    settings |= {f"model.text_encoder.{key}": value for key, value in tiny.TEXT_ENCODER.items()}
    settings |= {"model.index.expand_timesteps": True,
                 "model.scheduler._class_name": "UniPCMultistepScheduler", "model.scheduler.flow_shift": 3.0,
                 "model.scheduler.use_flow_sigmas": True, "model.scheduler.prediction_type": "flow_prediction",
                 "model.defaults.text_length": 3}  # fmt: skip
    return configs.load("configs/base.py", settings | {key.replace("__", "."): v for key, v in overrides.items()})


def data(settings: configs.Config) -> dict[str, LatentDataset]:
    """tests/train/tiny.py's, in this model's scale."""
    return _scaled(tiny.data(), settings)


def rows(settings: configs.Config) -> dict[str, LatentDataset]:
    """More of them, for batches that are cut over devices."""
    return _scaled(tiny.rows(settings), settings)


def _scaled(data: dict[str, LatentDataset], settings: configs.Config) -> dict[str, LatentDataset]:
    scale = setup.about(settings).traits.latents
    return {name: dataclasses.replace(dataset, scale=scale) for name, dataset in data.items()}
