"""The toy as the rest of the package sees it."""

from collections.abc import Mapping

from sdv_jax.checkpoints.family import Component, Family
from sdv_jax.checkpoints.rules import t5
from sdv_jax.diffusion import FlowSchedulerConfig
from sdv_jax.errors import UserError
from sdv_jax.models.contract import Geometry, LatentScale, Traits, check_references_before
from sdv_jax.models.text.t5 import SHARDING as TEXT_SHARDING
from sdv_jax.models.text.t5 import T5Config, T5Encoder
from tests.toy_family import LORA_TARGETS, SHARDING, VARIANTS, rules
from tests.toy_family.transformer import Transformer, TransformerConfig
from tests.toy_family.vae import VAE, VAEConfig


def traits(configs: Mapping[str, object], about: Mapping) -> Traits:
    """What pipeline and training ask; a folder's defaults.json comes before our own."""
    transformer, vae = configs["transformer"], configs["vae"]
    own = {"height": 32, "width": 48, "num_frames": 5, "steps": 4, "guidance": 3.0, "fps": 8.0, "text_length": 12}
    own |= about.get("defaults", {})
    return Traits(
        geometry=Geometry(
            height=own["height"],
            width=own["width"],
            num_frames=own["num_frames"],
            spatial=vae.spatial_compression,
            temporal=1,
            patch=transformer.patch_size,
            channels=vae.latent_channels,
            period=1,
        ),
        latents=LatentScale.factor(vae.scaling_factor),
        text_length=own["text_length"],
        text_width=transformer.text_dim,
        steps=own["steps"],
        guidance=own["guidance"],
        fps=own["fps"],
    )


def options(adaln: str, reference: Mapping | None) -> dict:
    """Keywords of the transformer's call; it has none beyond the contract."""
    if adaln != "all":
        raise UserError(f"lora.adaln is {adaln!r}, expected 'all': the toy has no adaLN layers")
    check_references_before(reference, "the toy")
    return {}


FAMILY = Family(
    name="toy",
    pipelines=("ToyPipeline",),
    components={
        "transformer": Component(
            "ToyTransformer", "diffusion_pytorch_model", TransformerConfig, Transformer,
            lambda config: rules.TRANSFORMER,
        ),
        "vae": Component("ToyAutoencoder", "diffusion_pytorch_model", VAEConfig, VAE, lambda config: rules.VAE),
        "text_encoder": Component(
            "T5EncoderModel", "model", T5Config, T5Encoder, lambda config: t5.ENCODER, sharding=TEXT_SHARDING
        ),
    },
    scheduler=FlowSchedulerConfig.from_dict,
    schedulers={"euler": "FlowMatchEulerDiscreteScheduler"},
    variants=VARIANTS,
    sharding=SHARDING,
    lora_targets=LORA_TARGETS,
    traits=traits,
    options=options,
    peer="tests.toy_family.peer",
)  # fmt: skip
