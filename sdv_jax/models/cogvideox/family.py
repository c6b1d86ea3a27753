"""CogVideoX as the rest of the package sees it: the one file of the family that looks up the stack."""

from collections.abc import Mapping

from sdv_jax.checkpoints.family import Component, Family
from sdv_jax.checkpoints.rules import t5
from sdv_jax.diffusion.schedules import SchedulerConfig
from sdv_jax.models.cogvideox import LORA_TARGETS, SHARDING, VARIANTS, rules
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from sdv_jax.models.cogvideox.vae import VAE, VAEConfig
from sdv_jax.models.contract import Geometry, LatentScale, Traits, check_fit, check_references_before
from sdv_jax.models.text.t5 import SHARDING as TEXT_SHARDING
from sdv_jax.models.text.t5 import T5Config, T5Encoder


def traits(configs: Mapping[str, object], about: Mapping) -> Traits:
    """Sizes come from the transformer, as in diffusers' pipelines. Raises UserError for parts that do not fit."""
    transformer, vae, own = configs["transformer"], configs["vae"], about.get("defaults", {})
    takes_image = transformer.in_channels == 2 * vae.latent_channels
    check_fit(
        ("transformer.out_channels", transformer.out_channels, "vae.latent_channels", vae.latent_channels),
        ("transformer.in_channels", transformer.in_channels, "vae.latent_channels, or twice that,",
         2 * vae.latent_channels if takes_image else vae.latent_channels),
        ("transformer.text_embed_dim", transformer.text_embed_dim, "text_encoder.d_model",
         configs["text_encoder"].d_model),
    )  # fmt: skip
    spatial, temporal = 2 ** (len(vae.block_out_channels) - 1), int(vae.temporal_compression_ratio)
    image = LatentScale.factor(1 / vae.scaling_factor if vae.invert_scale_latents else vae.scaling_factor)
    return Traits(
        geometry=Geometry(
            height=own.get("height", transformer.sample_height * spatial),
            width=own.get("width", transformer.sample_width * spatial),
            num_frames=own.get("num_frames", transformer.sample_frames),
            spatial=spatial,
            temporal=temporal,
            patch=transformer.patch_size,
            frame_patch=transformer.patch_size_t or 1,
            channels=vae.latent_channels,
            period=1 if temporal == 1 else 2 * temporal,
        ),
        latents=LatentScale.factor(vae.scaling_factor),
        image_latents=image if takes_image else None,
        text_length=transformer.max_text_seq_length,
        text_width=transformer.text_embed_dim,
        steps=own.get("steps", 50),
        guidance=own.get("guidance", 6.0),
        fps=own.get("fps", 16.0 if transformer.patch_size_t else 8.0),
    )


def options(adaln: str, reference: Mapping | None) -> dict:
    """References stand before the clip, always."""
    check_references_before(reference, "CogVideoX")
    return {"adaln_lora": adaln}


FAMILY = Family(
    name="cogvideox",
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    components={
        "transformer": Component(
            "CogVideoXTransformer3DModel", "diffusion_pytorch_model", TransformerConfig, Transformer,
            rules.of_transformer,
        ),
        "vae": Component(
            "AutoencoderKLCogVideoX", "diffusion_pytorch_model", VAEConfig, VAE, lambda config: rules.VAE
        ),
        "text_encoder": Component(
            "T5EncoderModel", "model", T5Config, T5Encoder, lambda config: t5.ENCODER, sharding=TEXT_SHARDING
        ),
    },
    scheduler=SchedulerConfig.from_dict,
    schedulers={"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"},
    variants=VARIANTS,
    sharding=SHARDING,
    lora_targets=LORA_TARGETS,
    traits=traits,
    options=options,
    peer="sdv_jax.models.cogvideox.peer",
)  # fmt: skip
