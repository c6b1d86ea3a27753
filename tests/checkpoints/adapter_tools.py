"""For the tests of adapter files: a tiny CogVideoX there and here, PEFT's adapters in it, and changes to files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file

from sdv_jax.checkpoints.rules.table import Rules
from sdv_jax.errors import UserError
from sdv_jax.models.cogvideox import rules as cogvideox

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 3, "sample_width": 6, "sample_height": 4, "sample_frames": 9,
    "max_text_seq_length": 5,
}  # fmt: skip
PAPER = ("to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2")
RANK = 4
NAMES = cogvideox.transformer(2).to_torch_module_name


# MARK: a model, there and here


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every parameter random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def filled(model: nnx.Module, rules: Rules, theirs: torch.nn.Module) -> nnx.Module:
    """Our abstract model with the weights of the torch model, copied by the rules."""
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        rule = rules.of_path(".".join(path))
        layers = range(variable.shape[0]) if rule.stacked else [None]
        values = [rule.transform.to_ours(weights[rule.torch_name(".".join(path), layer)]) for layer in layers]
        variable.set_value(jnp.asarray(np.stack(values) if rule.stacked else values[0]))
    return model


def peft(model, *, alpha=RANK, rank=RANK, targets=PAPER, seed=1, **options):
    """PEFT's own adapter inside diffusers' model, with weights that do something."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)
    inject_adapter_in_model(config, model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval(), config


def tensors_of(model, prefix="transformer.") -> dict[str, np.ndarray]:
    """The adapter as diffusers would write it."""
    return {prefix + name: value.numpy() for name, value in get_peft_model_state_dict(model).items()}


def run_theirs(model) -> np.ndarray:
    latents, text, times = _inputs()
    with torch.no_grad():
        out = model(torch.tensor(latents).permute(0, 1, 4, 2, 3), torch.tensor(text), torch.tensor(times)).sample
    return out.permute(0, 1, 3, 4, 2).numpy()


_forward = jax.jit(lambda model, *inputs: model(*inputs))


def run_ours(model) -> np.ndarray:
    return np.asarray(_forward(model, *map(jnp.asarray, _inputs())))


def _inputs():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 4, 6, 4)).astype(np.float32)
    return latents, rng.standard_normal((2, 5, 12)).astype(np.float32), np.array([3, 700])


# MARK: files


def changed(path, change):
    """The file again, under another name, after `change(tensors)`, which may return header entries."""
    tensors = load_file(path)
    metadata = change(tensors)
    new = path.with_name("changed.safetensors")
    save_file(tensors, new, metadata=metadata)
    return new


# MARK: changes for `changed`, and what is wrong then


def refused(message, act, *args, **options):
    """Fails unless `act` raises UserError with `message` in it, in one line."""
    with pytest.raises(UserError) as caught:
        act(*args, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def put(key, value):
    def change(tensors):
        tensors[key] = value

    return change


def drop(key):
    def change(tensors):
        del tensors[key]

    return change


def rename(old, new):
    def change(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def header(**config):
    """diffusers' header entry with these keys of PEFT's config."""
    return lambda tensors: {"lora_adapter_metadata": json.dumps(config)}
