"""Wan as its makers released it: the same reading interface as `diffusers_folder`, for folders of another layout.

    config.json, diffusion_pytorch_model*.safetensors       the transformer; in Wan2.2-T2V-A14B there are two,
                                                            in high_noise_model/ and low_noise_model/
    Wan2.1_VAE.pth or Wan2.2_VAE.pth
    models_t5_umt5-xxl-enc-bf16.pth
    google/umt5-xxl/                                        the tokenizer

Sizes are read off the tensors, so that models of any size are read; what no tensor tells stands in the transformer's
config.json, and what the release keeps in its code (`wan/configs`, `wan/modules`) is in this file.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sdv_jax.checkpoints.diffusers_folder import FORMAT_VERSION, check_tokenizer, parse_component, raise_all, read_json
from sdv_jax.checkpoints.engine import Source, match
from sdv_jax.checkpoints.family import Family
from sdv_jax.checkpoints.rules.table import Rules
from sdv_jax.checkpoints.safetensors_io import Tensor, open_folder
from sdv_jax.checkpoints.torch_files import open_file
from sdv_jax.errors import UserError
from sdv_jax.models.contract import check_defaults
from sdv_jax.models.wan import original_names
from sdv_jax.models.wan.family import FAMILY
from sdv_jax.models.wan.original_names import Names
from sdv_jax.models.wan.vae import VAEConfig
from sdv_jax.models.wan.vae22 import VAE22

Tensors = Mapping[str, Tensor]

_EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
_TEXT_ENCODERS = "models_t5_*.pth"
_WEIGHTS = "diffusion_pytorch_model"
_TOLD = ("model_type", "num_heads", "eps", "text_len")  # keys of config.json that no shape tells
_BOUNDARY = 0.875  # of A14B: where on the noise scale the experts change, `wan/configs/wan_t2v_A14B.py`
_FLOW_SHIFT = {False: 3.0, True: 5.0}  # as published for diffusers, by whether the model takes a time per token (TI2V)
_TEXT_LENGTH = 512
_VERSION = {"_diffusers_version": "0.35.0.dev0"}  # whose file layouts these are

_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler", **_VERSION, "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "disable_corrector": [], "dynamic_thresholding_ratio": 0.995, "final_sigmas_type": "zero",
    "lower_order_final": True, "num_train_timesteps": 1000, "predict_x0": True, "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "solver_order": 2, "solver_p": None,
    "solver_type": "bh2", "steps_offset": 0, "thresholding": False, "time_shift_type": "exponential",
    "timestep_spacing": "linspace", "trained_betas": None, "use_beta_sigmas": False, "use_dynamic_shifting": False,
    "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False,
}  # fmt: skip
_TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"], "classifier_dropout": 0.0, "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06,
    "model_type": "umt5", "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "scalable_attention": True, "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "use_cache": True,
}  # fmt: skip


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like a release of Wan, complete or not, rather than like a diffusers pipeline."""
    if (folder / "model_index.json").is_file():
        return False
    names = (*_VAES, *_EXPERTS.values(), "google/umt5-xxl")
    return any((folder / name).exists() for name in names) or any(folder.glob(_TEXT_ENCODERS))


def tokenizer(folder: Path) -> Path:
    """Where the tokenizer's files lie."""
    return folder / "google" / "umt5-xxl"


def read_config(folder: Path) -> dict:
    """The same as `diffusers_folder.read_config`, with the configs that diffusers' version of the model would have.

    Raises UserError for missing or unreadable files, and for models other than text-to-video and TI2V.
    """
    experts = [part for part, name in _EXPERTS.items() if (folder / name).exists()]
    if experts and (surplus := sorted(file.name for file in folder.glob(f"{_WEIGHTS}*"))):
        raise UserError(f"{folder}: {surplus[0]} beside {_EXPERTS[experts[0]]}; keep the model to convert")
    parts = ["transformer", "vae", "text_encoder", *(["transformer_2"] if experts else [])]
    raw, configs, errors, defaults = {}, {}, [], {}
    for name in parts:
        try:
            where, tensors = _open(folder, name)
            if name.startswith("transformer"):
                about = read_json(where / "config.json")
                raw[name] = _transformer(tensors, about, where)
                if (length := about.get("text_len", _TEXT_LENGTH)) != _TEXT_LENGTH:
                    defaults = check_defaults({"text_length": length}, f"{where / 'config.json'}: text_len")
            else:
                raw[name] = (_vae if name == "vae" else _text_encoder)(tensors, where)
            configs[name] = parse_component(FAMILY, name, raw[name], where)
        except UserError as error:
            errors.append(str(error))
    try:
        check_tokenizer(tokenizer(folder))
    except UserError as error:
        errors.append(str(error))
    raise_all(errors)
    per_token = bool(raw["vae"]["is_residual"])  # the one model with the VAE of 2.2 is TI2V-5B
    return {
        "format_version": FORMAT_VERSION,
        "family": FAMILY.name,
        "variant": FAMILY.variant(configs),
        "source": str(folder.absolute()),
        "model_index": _model_index(FAMILY, parts, per_token),
        "config": raw,
        "scheduler": dict(sorted((_SCHEDULER | {"flow_shift": _FLOW_SHIFT[per_token]}).items())),
        "defaults": defaults,
    }


def open_component(folder: Path, family: Family, name: str, raw: dict) -> Source:
    """The weights of one component, matched with the model its config describes, under diffusers' names.

    Raises UserError for files that are missing, damaged or do not hold exactly the model's tensors; it names them as
    the files do.
    """
    where, tensors = _open(folder, name)
    component = family.components[name]
    config = parse_component(family, name, raw, where)
    leaves, names = component.leaves(config), _names(name, raw)
    originals = tuple(replace(leaf, names=tuple(map(names.original, leaf.names))) for leaf in leaves)
    match(tensors, originals, Rules(table=()), where=str(where))
    return Source(str(where), leaves, {names.diffusers(name): tensor for name, tensor in tensors.items()}, tied={})


def _names(name: str, raw: dict) -> Names:
    if name == "vae":
        blocks, stages = raw["num_res_blocks"], len(raw["dim_mult"])
        return original_names.vae22(blocks) if raw["is_residual"] else original_names.vae21(blocks, stages)
    return original_names.UMT5 if name == "text_encoder" else original_names.TRANSFORMER


# ---------------------------------------------------------------- files


def _open(folder: Path, name: str) -> tuple[Path, Tensors]:
    """(the file or folder that holds a component, its tensors)."""
    if name == "vae":
        file = _the_file(folder, [folder / vae for vae in _VAES if (folder / vae).is_file()], " or ".join(_VAES))
        return file, open_file(file)
    if name == "text_encoder":
        file = _the_file(folder, sorted(folder.glob(_TEXT_ENCODERS)), _TEXT_ENCODERS)
        return file, open_file(file)
    where = folder / _EXPERTS[name] if any((folder / expert).exists() for expert in _EXPERTS.values()) else folder
    if not any(where.glob(f"{_WEIGHTS}*")):
        raise UserError(f"{where}: no {_WEIGHTS}.safetensors, the {name}; expected an original release of Wan")
    return where, open_folder(where)


def _the_file(folder: Path, found: list[Path], wanted: str) -> Path:
    if len(found) != 1:
        what = f"several files ({', '.join(file.name for file in found)}); keep one" if found else "no such file"
        raise UserError(f"{folder}: {wanted}: {what}; expected an original release of Wan")
    return found[0]


def _model_index(family: Family, parts: list[str], per_token: bool) -> dict:
    known = {name: ["transformers" if name == "text_encoder" else "diffusers", component.torch_class]
             for name, component in family.components.items()}  # fmt: skip
    return {
        "_class_name": family.pipelines[0],
        **_VERSION,
        "boundary_ratio": _BOUNDARY if "transformer_2" in parts else None,
        "expand_timesteps": per_token,
        "scheduler": ["diffusers", _SCHEDULER["_class_name"]],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        **{name: value if name in parts else [None, None] for name, value in sorted(known.items())},
    }


# ---------------------------------------------------------------- configs, from shapes


def _shape(tensors: Tensors, name: str, rank: int, where: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise UserError(f"{where}: no tensor {name}, which every Wan model has")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(f"{where}: tensor {name} has shape {shape}, expected {rank} axes, none of length 0")
    return shape


def _count(tensors: Tensors, prefix: str) -> int:
    """How many modules PREFIX.0, PREFIX.1, … there are."""
    return 1 + max((int(n) for name in tensors if (n := name.removeprefix(prefix).split(".")[0]).isdecimal()
                    and name.startswith(prefix)), default=-1)  # fmt: skip


def _transformer(tensors: Tensors, about: dict, where: Path) -> dict:
    """`about`: the release's config.json, which must agree with the tensors."""
    file, kind = where / "config.json", about.get("model_type", "t2v")
    if any(name.startswith("img_emb.") for name in tensors) or kind not in ("t2v", "ti2v"):
        raise UserError(f"{where}: a model of kind {kind!r} with inputs of its own; supported are t2v and ti2v")
    dim, in_dim, *patch = _shape(tensors, "patch_embedding.weight", 5, where)
    found = {
        "dim": dim,
        "in_dim": in_dim,
        "patch_size": patch,
        "ffn_dim": _shape(tensors, "blocks.0.ffn.0.weight", 2, where)[0],
        "freq_dim": _shape(tensors, "time_embedding.0.weight", 2, where)[1],
        "text_dim": _shape(tensors, "text_embedding.0.weight", 2, where)[1],
        "out_dim": _shape(tensors, "head.head.weight", 2, where)[0] // math.prod(patch),
        "num_layers": _count(tensors, "blocks."),
    }
    told = {"num_heads": 0, "eps": 1e-6, "text_len": _TEXT_LENGTH, "model_type": kind} | about
    known = {*found, *_TOLD}
    if unknown := sorted(key for key in told.keys() - known if not key.startswith("_")):
        raise UserError(f"{file}: unknown config key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if wrong := [f"{key} is {about[key]}, the tensors have {value}" for key, value in found.items()
                 if key in about and about[key] != value]:  # fmt: skip
        raise UserError(f"{file}: {'; '.join(wrong)}")
    heads = told["num_heads"]
    if type(heads) is not int or heads < 1 or dim % heads:
        raise UserError(f"{file}: num_heads is {heads!r}; expected a divisor of the width {dim}")
    return {
        "_class_name": "WanTransformer3DModel",
        **_VERSION,
        "added_kv_proj_dim": None,
        "attention_head_dim": dim // heads,
        "cross_attn_norm": True,
        "eps": told["eps"],
        "ffn_dim": found["ffn_dim"],
        "freq_dim": found["freq_dim"],
        "image_dim": None,
        "in_channels": in_dim,
        "num_attention_heads": heads,
        "num_layers": found["num_layers"],
        "out_channels": found["out_dim"],
        "patch_size": patch,
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": found["text_dim"],
    }


def _vae(tensors: Tensors, where: Path) -> dict:
    """Of either generation; in the older one the blocks of all stages are one flat list."""
    staged = "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors
    base, channels = _shape(tensors, "encoder.conv1.weight", 5, where)[:2]
    if staged:
        stages = _count(tensors, "encoder.downsamples.")
        blocks = sum(f"encoder.downsamples.0.downsamples.{n}.residual.2.weight" in tensors for n in range(99))
        places = [f"encoder.downsamples.{i}.downsamples.{{}}" for i in range(stages)]
        first, last = [place.format(0) for place in places], [place.format(blocks) for place in places[:-1]]
    else:
        total = _count(tensors, "encoder.downsamples.")
        ends = [n for n in range(total) if f"encoder.downsamples.{n}.resample.1.weight" in tensors]
        blocks = ends[0] if ends else total
        first = [f"encoder.downsamples.{n}" for n in (0, *(end + 1 for end in ends))]
        last = [f"encoder.downsamples.{n}" for n in ends]
    factors = [_shape(tensors, f"{place}.residual.6.weight", 5, where)[0] // base for place in first]
    z_dim = _shape(tensors, "conv2.weight", 5, where)[0]
    published = VAE22 if staged else VAEConfig()
    if z_dim != published.z_dim:
        known = f"{published.z_dim}, for which the release's code has means and deviations"
        raise UserError(f"{where}: latents of {z_dim} channels; expected {known}")
    times = [f"{place}.time_conv.weight" in tensors for place in last]
    patch = math.isqrt(channels // 3) if staged else None
    decoder_dim = _shape(tensors, "decoder.conv1.weight", 5, where)[0] // max(factors[-1], 1) if staged else None
    return {
        "_class_name": "AutoencoderKLWan",
        **_VERSION,
        "attn_scales": [],
        "base_dim": base,
        "decoder_base_dim": decoder_dim,
        "dim_mult": factors,
        "dropout": 0.0,
        "in_channels": channels,
        "is_residual": staged,
        "latents_mean": list(published.latents_mean),
        "latents_std": list(published.latents_std),
        "num_res_blocks": blocks,
        "out_channels": _shape(tensors, "decoder.head.2.weight", 5, where)[0],
        "patch_size": patch,
        "scale_factor_spatial": 2 ** len(last) * (patch or 1),
        "scale_factor_temporal": 2 ** sum(times),
        "temperal_downsample": times,
        "z_dim": z_dim,
    }


def _text_encoder(tensors: Tensors, where: Path) -> dict:
    vocab, width = _shape(tensors, "token_embedding.weight", 2, where)
    buckets, heads = _shape(tensors, "blocks.0.pos_embedding.embedding.weight", 2, where)
    layers = _count(tensors, "blocks.")
    return dict(sorted({
        **_TEXT_ENCODER,
        "d_ff": _shape(tensors, "blocks.0.ffn.fc1.weight", 2, where)[0],
        "d_kv": _shape(tensors, "blocks.0.attn.q.weight", 2, where)[0] // heads,
        "d_model": width,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "num_layers": layers,
        "relative_attention_num_buckets": buckets,
        "torch_dtype": tensors["token_embedding.weight"].dtype.name,
        "vocab_size": vocab,
    }.items()))  # fmt: skip
