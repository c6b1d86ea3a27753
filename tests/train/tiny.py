"""A model, data and a configuration small enough to train in a test."""

import numpy as np

from sdv_jax.data.latents import LatentDataset
from sdv_jax.models.contract import LatentScale
from sdv_jax.train import config as configs

TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 8, "num_layers": 1, "sample_width": 4, "sample_height": 4, "sample_frames": 5,
    "max_text_seq_length": 3, "use_rotary_positional_embeddings": True,
}  # fmt: skip
TEXT_ENCODER = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
SCHEDULER = {
    "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "snr_shift_scale": 1.0,
}  # fmt: skip
VAE = {"latent_channels": 4}
SCALE = LatentScale.factor(0.7)


def dataset(n: int, *, frames: int, views: int, token_ids: bool = False, seed: int = 0) -> LatentDataset:
    """Random prepared data: latents of 4 × 4 × 4, three text tokens."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    text = rng.integers(1, 16, (n, 3)).astype(np.int32) if token_ids else normal(n, 3, 8)
    return LatentDataset(
        mean=normal(n, frames, 4, 4, 4), logvar=normal(n, frames, 4, 4, 4) - 4,
        reference_mean=normal(n, views, 4, 4, 4), reference_logvar=normal(n, views, 4, 4, 4) - 4,
        text=text, empty_text=np.zeros_like(text[0]),
        captions=tuple(f"caption {i}" for i in range(n)), scale=SCALE,
    )  # fmt: skip


def data(*, token_ids: bool = False) -> dict[str, LatentDataset]:
    """Both datasets, of 10 rows each."""
    return {
        "identity": dataset(10, frames=1, views=2, token_ids=token_ids, seed=1),
        "motion": dataset(10, frames=2, views=5, token_ids=token_ids, seed=2),
    }


def rows(settings: configs.Config) -> dict[str, LatentDataset]:
    """48 rows of each, for batches that are cut over devices."""
    token_ids = settings.text.train_encoder
    return {
        "identity": dataset(48, frames=1, views=2, token_ids=token_ids, seed=1),
        "motion": dataset(48, frames=2, views=5, token_ids=token_ids, seed=2),
    }


def config(**overrides) -> configs.Config:
    """configs/base.py at this size; overrides are SECTION__KEY=VALUE or dotted keys."""
    settings = {
        "train.steps": 6, "train.save_every": 100, "identity.batch_size": 4, "motion.batch_size": 4,
        "text_to_video.batch_size": 4, "lora.rank": 2, "lora.alpha": 2.0, "lora.dropout": 0.0,
        "optimizer.learning_rate": 1e-2, "optimizer.warmup": 2, "switch.motion_probability": 0.4,
    }  # fmt: skip
    settings |= {f"model.transformer.{key}": value for key, value in TRANSFORMER.items()}
    settings |= {f"model.vae.{key}": value for key, value in VAE.items()}
    settings |= {f"model.text_encoder.{key}": value for key, value in TEXT_ENCODER.items()}
    settings |= {f"model.scheduler.{key}": value for key, value in SCHEDULER.items()}
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return configs.load("configs/base.py", settings)
