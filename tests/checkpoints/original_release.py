"""Tiny Wan models with random weights: as a diffusers pipeline folder, and the same weights as the original release."""

import json
import pathlib
import shutil

from sdv_jax.models.wan import original_names
from sdv_jax.models.wan.vae import VAEConfig
from sdv_jax.models.wan.vae22 import VAE22
from tests.tiny_pipeline import make_tokenizer

KINDS = ("Wan2.1-T2V", "Wan2.2-TI2V", "Wan2.2-A14B")
_TRANSFORMER = dict(num_attention_heads=3, attention_head_dim=12, text_dim=16, freq_dim=8, ffn_dim=40, num_layers=2)
_VAE = {
    False: dict(base_dim=6, z_dim=16, dim_mult=[1, 2, 3], num_res_blocks=1, temperal_downsample=[False, True],
                scale_factor_temporal=2, scale_factor_spatial=4,
                latents_mean=list(VAEConfig().latents_mean), latents_std=list(VAEConfig().latents_std)),
    True: dict(base_dim=4, decoder_base_dim=6, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
               temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
               patch_size=2, scale_factor_temporal=4, scale_factor_spatial=16,
               latents_mean=list(VAE22.latents_mean), latents_std=list(VAE22.latents_std)),
}  # fmt: skip


def save_pipeline(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """diffusers' WanPipeline of one of `KINDS`; float32, the text encoder bfloat16."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    newer = kind == "Wan2.2-TI2V"
    channels = _VAE[newer]["z_dim"]
    parts = dict(
        transformer=WanTransformer3DModel(**_TRANSFORMER, in_channels=channels, out_channels=channels),
        vae=AutoencoderKLWan(**_VAE[newer]),
        text_encoder=UMT5EncoderModel(UMT5Config(
            vocab_size=128, d_model=16, d_kv=5, d_ff=24, num_layers=2, num_heads=3, relative_attention_num_buckets=8,
            torch_dtype="bfloat16",
        )),
    )  # fmt: skip
    if kind == "Wan2.2-A14B":
        parts["transformer_2"] = WanTransformer3DModel(**_TRANSFORMER, in_channels=channels, out_channels=channels)
    for module in parts.values():
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter)
    parts["text_encoder"].to(torch.bfloat16)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0 if newer else 3.0
    )
    WanPipeline(
        tokenizer=make_tokenizer(), scheduler=scheduler, **{"transformer_2": None, **parts},
        boundary_ratio=0.875 if "transformer_2" in parts else None, expand_timesteps=newer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_release(pipeline: pathlib.Path, folder: pathlib.Path, *, shard_size: str = "10GB") -> pathlib.Path:
    """The weights of a folder of `save_pipeline`, laid out and named as Wan's makers do."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    vae = json.loads((pipeline / "vae" / "config.json").read_text())
    newer, blocks = vae["is_residual"], vae["num_res_blocks"]
    experts = ["transformer"] if not (pipeline / "transformer_2").exists() else ["transformer", "transformer_2"]
    for name, subfolder in zip(experts, ["high_noise_model", "low_noise_model"], strict=False):
        place = folder / subfolder if len(experts) == 2 else folder
        _save_transformer(pipeline / name, place, "ti2v" if newer else "t2v", shard_size)
    names = original_names.vae22(blocks) if newer else original_names.vae21(blocks, len(vae["dim_mult"]))
    found = load_file(pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    state = {names.original(name): tensor for name, tensor in found.items()}
    torch.save(state, folder / f"Wan2.{2 if newer else 1}_VAE.pth")
    found = load_file(pipeline / "text_encoder" / "model.safetensors")
    state = {original_names.UMT5.original(name): tensor for name, tensor in found.items()}
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(pipeline / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def _save_transformer(source: pathlib.Path, place: pathlib.Path, kind: str, shard_size: str) -> None:
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    found = load_file(source / "diffusion_pytorch_model.safetensors")
    state = {original_names.original_name(name): tensor for name, tensor in found.items()}
    place.mkdir(exist_ok=True)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, place, filename_pattern=pattern, max_shard_size=shard_size)
    config = json.loads((source / "config.json").read_text())
    about = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": kind,
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }
    (place / "config.json").write_text(json.dumps(about, indent=2))
