"""A diffusers CogVideoX pipeline small enough for tests, with random weights, a working tokenizer and a scheduler."""

import pathlib
import string

TEXT_LENGTH = 12
SCHEDULER = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
    prediction_type="v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True, timestep_spacing="trailing",
)  # fmt: skip


def make_pipeline(*, rotary: bool = True, scheduler: str = "ddim", seed: int = 0):
    """diffusers' CogVideoXPipeline: 16x24 pixels and 9 frames by default, 4 pixels per latent, 12 text tokens."""
    import torch
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=6, sample_height=4, sample_frames=9,
        max_text_seq_length=TEXT_LENGTH, use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=16,
        sample_width=24, scaling_factor=0.7,
    )  # fmt: skip
    text_encoder = T5EncoderModel(T5Config(
        vocab_size=128, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    ))  # fmt: skip
    schedulers = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
    _randomise(transformer, vae, text_encoder)
    return CogVideoXPipeline(
        tokenizer=make_tokenizer(), text_encoder=text_encoder.eval(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=schedulers[scheduler](**SCHEDULER, snr_shift_scale=1.0 if rotary else 3.0),
    )  # fmt: skip


def save_pipeline(folder: pathlib.Path, **options) -> pathlib.Path:
    """`make_pipeline(**options)` saved as a diffusers folder."""
    make_pipeline(**options).save_pretrained(folder)
    return folder


def make_tokenizer():
    """A T5 tokenizer of single letters and a few words."""
    from transformers import T5Tokenizer

    pieces = [*string.ascii_lowercase, *string.punctuation, "▁a", "▁red", "▁ball", "▁cat", "▁on", "▁sand", "▁"]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)),
    ]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH)


def _randomise(*modules) -> None:
    """Gives every parameter a value of its own: fresh norms and zero-initialised gates would hide mistakes."""
    import torch

    for module in modules:
        for parameter in module.parameters():
            with torch.no_grad():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif not parameter.any():
                    parameter.copy_(0.1 * torch.randn_like(parameter))
