"""Wan as the rest of the package sees it: the one file of the family that looks up the stack."""

from collections.abc import Mapping

from sdv_jax.checkpoints.family import Component, Family
from sdv_jax.checkpoints.rules import umt5
from sdv_jax.diffusion.flow import FlowSchedulerConfig
from sdv_jax.errors import UserError
from sdv_jax.models.config_check import refuse
from sdv_jax.models.contract import Geometry, LatentScale, Traits, check_fit
from sdv_jax.models.text.t5 import SHARDING as TEXT_SHARDING
from sdv_jax.models.text.tokenizer import clean_wan
from sdv_jax.models.text.umt5 import UMT5Config, UMT5Encoder
from sdv_jax.models.wan import LORA_TARGETS, SHARDING, VARIANTS, original_names, rules, vae_rules
from sdv_jax.models.wan.transformer import ReferencePlacement, Transformer, TransformerConfig
from sdv_jax.models.wan.vae import VAE, VAEConfig

_ANY = {"height": 480, "width": 832, "num_frames": 81, "steps": 50, "guidance": 5.0, "fps": 16.0, "text_length": 512}
# What the original releases sample with; diffusers' pipeline knows one set of defaults for all.
_PUBLISHED = {
    "Wan2.1-T2V-14B": _ANY | {"height": 720, "width": 1280},
    "Wan2.2-TI2V-5B": _ANY | {"height": 704, "width": 1280, "num_frames": 121, "fps": 24.0},
    "Wan2.2-T2V-A14B": _ANY | {"height": 720, "width": 1280, "steps": 40, "guidance": 4.0, "second_guidance": 3.0},
}


def traits(configs: Mapping[str, object], about: Mapping) -> Traits:
    """Sizes come from the VAE; what else a release sets stands in its model_index.json or in the table above.

    Raises UserError for parts that do not fit, image-to-video models of 36 input channels among them.
    """
    transformer, vae, index = configs["transformer"], configs["vae"], about.get("model_index", {})
    _check(configs, index)
    own = _PUBLISHED.get(about.get("variant"), _ANY) | about.get("defaults", {})
    latents = LatentScale(tuple(vae.latents_mean), tuple(1 / std for std in vae.latents_std), sampled=False)
    expands = index.get("expand_timesteps") is True
    return Traits(
        geometry=Geometry(
            height=own["height"],
            width=own["width"],
            num_frames=own["num_frames"],
            spatial=vae.spatial_compression,
            temporal=vae.temporal_compression,
            patch=transformer.patch_size[1],
            frame_patch=transformer.patch_size[0],
            channels=vae.latent_channels,
            period=vae.temporal_compression,
        ),
        latents=latents,
        image_latents=latents if expands else None,
        clamps_image=True,
        text_length=own["text_length"],
        text_width=transformer.text_dim,
        text_masked=True,
        clean_text=clean_wan,
        steps=own["steps"],
        guidance=own["guidance"],
        fps=own["fps"],
        boundary=index.get("boundary_ratio"),
        second_guidance=own.get("second_guidance"),
    )


def _check(configs: Mapping[str, object], index: Mapping) -> None:
    vae, text, experts = configs["vae"], configs["text_encoder"], [n for n in configs if n.startswith("transformer")]
    check_fit(*(
        (f"{name}.{key}", getattr(configs[name], key), at, value)
        for name in experts
        for key, at, value in (
            ("in_channels", "vae.z_dim", vae.latent_channels),
            ("out_channels", "vae.z_dim", vae.latent_channels),
            ("text_dim", "text_encoder.d_model", text.d_model),
            ("patch_size", "transformer.patch_size", configs["transformer"].patch_size),
        )
    ))  # fmt: skip
    boundary, expands = index.get("boundary_ratio"), index.get("expand_timesteps", False)
    if boundary is not None and (type(boundary) not in (int, float) or not 0 < boundary < 1):
        refuse("model_index.json", "boundary_ratio", boundary, "null or a number between 0 and 1")
    if boundary is not None and len(experts) < 2:
        refuse("model_index.json", "boundary_ratio", boundary, "null, as there is no transformer_2")
    if expands is not None and type(expands) is not bool:
        refuse("model_index.json", "expand_timesteps", expands, "true or false")


def options(adaln: str, reference: Mapping | None) -> dict:
    """References stand where the adapter was trained to find them."""
    if adaln != "all":
        raise UserError(f"an adapter of the adaLN layers for {adaln!r} tokens; Wan has no such layers, expected 'all'")
    try:
        return {"placement": ReferencePlacement(**(reference or {}))}
    except TypeError:
        raise UserError(f"reference: {dict(reference)}; expected placement, offset and shift") from None


_TRANSFORMER = Component(
    "WanTransformer3DModel", "diffusion_pytorch_model", TransformerConfig, Transformer,
    lambda config: rules.transformer(config.patch_size),
    exact=r"time_embedder|scale_shift_table|norm2",  # diffusers' _keep_in_fp32_modules
)  # fmt: skip

FAMILY = Family(
    name="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    components={
        "transformer": _TRANSFORMER,
        "vae": Component("AutoencoderKLWan", "diffusion_pytorch_model", VAEConfig, VAE, vae_rules.vae),
        "text_encoder": Component(
            "UMT5EncoderModel", "model", UMT5Config, UMT5Encoder, lambda config: umt5.ENCODER, sharding=TEXT_SHARDING
        ),
        "transformer_2": _TRANSFORMER.but_optional(),
    },
    denoisers=("transformer", "transformer_2"),
    scheduler=FlowSchedulerConfig.from_dict,
    schedulers={"unipc": "UniPCMultistepScheduler", "euler": "FlowMatchEulerDiscreteScheduler"},
    variants=VARIANTS,
    sharding=SHARDING,
    lora_targets=LORA_TARGETS,
    traits=traits,
    options=options,
    original_names=original_names,
    index=("boundary_ratio", "expand_timesteps", "transformer_2"),
    peer="sdv_jax.models.wan.peer",
)  # fmt: skip
