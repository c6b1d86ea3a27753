"""diffusers Wan pipelines small enough for tests, with random weights, a working tokenizer and a scheduler."""

import pathlib

from tests.tiny_pipeline import make_tokenizer

TEXT_LENGTH = 9
DEFAULTS = {"height": 32, "width": 48, "num_frames": 9, "steps": 4, "guidance": 5.0, "fps": 16,
            "text_length": TEXT_LENGTH}  # fmt: skip
TRANSFORMER = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=20, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=24, ffn_dim=48, num_layers=2, rope_max_seq_len=64,
)  # fmt: skip
VAE = {
    "2.1": dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
                latents_mean=[0.1, -0.3, 0.0, 0.7], latents_std=[1.3, 0.8, 2.0, 1.1]),
    "2.2": dict(base_dim=4, decoder_base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
                temperal_downsample=[False, True, True], is_residual=True, patch_size=2, in_channels=12,
                out_channels=12, scale_factor_spatial=16, latents_mean=[0.1, -0.3, 0.0, 0.7],
                latents_std=[1.3, 0.8, 2.0, 1.1]),
}  # fmt: skip


def make_pipeline(kind: str = "ti2v", *, flow_shift: float = 5.0, seed: int = 0):
    """diffusers' WanPipeline: "t2v" (2.1), "ti2v" (2.2 with its VAE and expanded timesteps), "a14b" (two experts)."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    transformers = [WanTransformer3DModel(**TRANSFORMER).eval() for _ in range(2 if kind == "a14b" else 1)]
    vae = AutoencoderKLWan(**VAE["2.2" if kind == "ti2v" else "2.1"]).eval()
    text_encoder = UMT5EncoderModel(UMT5Config(
        vocab_size=128, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    )).eval()  # fmt: skip
    for module in (*transformers, vae, text_encoder):
        _randomise(module)
    return WanPipeline(
        tokenizer=make_tokenizer(), text_encoder=text_encoder, vae=vae, transformer=transformers[0],
        transformer_2=transformers[1] if kind == "a14b" else None,
        boundary_ratio=0.875 if kind == "a14b" else None, expand_timesteps=kind == "ti2v",
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
        ),
    )  # fmt: skip


def save_pipeline(folder: pathlib.Path, kind: str = "ti2v", **options) -> pathlib.Path:
    """`make_pipeline` saved as a diffusers folder, with defaults of this size."""
    import json

    make_pipeline(kind, **options).save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS))
    return folder


def _randomise(module) -> None:
    """Norms, biases and tables too: fresh ones would hide mistakes."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 or name.endswith("gamma"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
