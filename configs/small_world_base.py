"""The text-to-video base of the small world, from nothing: clips and still images, T5 trained along, Muon, averaging.

Target: prompts for motion and background are followed, and every clip shows one clean subject over all its frames.
About an hour on two CPU cores, the autoencoder before it a quarter of an hour.

    python -m sdv_jax.small_world.base --config configs/small_world_base.py --workdir runs/base \\
        --out models/small-world-cogvideox
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.transformer = dict(
        num_attention_heads=5, attention_head_dim=32, num_layers=6, in_channels=8, out_channels=8,
        time_embed_dim=128, text_embed_dim=64,
        sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=12, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    config.model.text_encoder = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    config.model.scheduler = dict(
        _class_name="CogVideoXDDIMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, num_train_timesteps=1000, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        set_alpha_to_one=True, snr_shift_scale=1.0, steps_offset=0, timestep_spacing="trailing",
    )  # fmt: skip

    config.train.objective = "text_to_video"
    config.train.mode = "full"
    config.train.steps = 4000
    config.train.ema_decay = 0.999
    config.train.save_every = 500
    config.sample.guidance = 1.5
    config.text.train_encoder = True
    config.text_to_video.batch_size = 40
    config.text_to_video.image_batch_size = 16

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup = 100
    return config
