"""The Wan VAEs: diffusers' tensor names and ours."""

from sdv_jax.checkpoints.rules.table import CONV2D, CONV3D, Rule, Rules, Transform

# A 1x1 convolution over images [out, in, 1, 1] <-> a matrix [in, out]
_POINT2D = Transform(lambda a: a[:, :, 0, 0].transpose(1, 0), lambda a: a.transpose(1, 0)[:, :, None, None])


def _scale(rank: int) -> Transform:
    """A norm's factors [c], which have axes of length 1 behind them there, up to this rank."""
    ones = (1,) * (rank - 1)
    return Transform(lambda a: a.reshape(a.shape[0]), lambda a: a.reshape(a.shape[0], *ones))


def _module(at: str, transform: Transform, *, torch: str = "", ours: str = "") -> tuple[Rule, Rule]:
    """Weight and bias of the modules whose path matches `at`; `torch` and `ours` follow it there and here."""
    there, here = f"{{at:{at}}}{torch}", f"{{at}}{ours}"
    return Rule(f"{there}.weight", f"{here}.kernel", transform), Rule(f"{there}.bias", f"{here}.bias")


def vae(config) -> Rules:
    """The table of a VAEConfig; only where the resamplers are depends on the kind."""
    down, up = r"encoder\.down_blocks\.\d+", r"decoder\.up_blocks\.\d+"
    if config.is_residual:
        down += r"\.downsampler"
    upsampler = ".upsampler" if config.is_residual else ".upsamplers.0"
    return Rules(
        table=(
            *_module(r".*\bconv(?:_in|_out|1|2|_shortcut)|quant_conv|post_quant_conv", CONV3D),
            *_module(down, CONV2D, torch=".resample.1", ours=".resample"),
            *_module(down, CONV3D, torch=".time_conv", ours=".time_conv"),
            *_module(up, CONV2D, torch=f"{upsampler}.resample.1", ours=".upsampler.resample"),
            *_module(up, CONV3D, torch=f"{upsampler}.time_conv", ours=".upsampler.time_conv"),
            *_module(r".*\.attentions\.\d+\.(?:to_qkv|proj)", _POINT2D),
            Rule(r"{at:.*\.attentions\.\d+\.norm}.gamma", "{at}.scale", _scale(3)),
            Rule(r"{at:.*\bnorm(?:1|2|_out)}.gamma", "{at}.scale", _scale(4)),
        )
    )
