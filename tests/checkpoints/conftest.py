"""The tiny CogVideoX of the tests of adapter files."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import CogVideoXTransformer3DModel
from flax import nnx
from safetensors.numpy import save_file

from sdv_jax.adapters import lora
from sdv_jax.models.cogvideox import rules as cogvideox
from sdv_jax.models.cogvideox.transformer import Transformer, TransformerConfig
from tests.checkpoints.adapter_tools import NAMES, PAPER, RANK, SIZES, filled, peft, randomised, run_theirs, tensors_of


@pytest.fixture(scope="module")
def base() -> CogVideoXTransformer3DModel:
    return randomised(CogVideoXTransformer3DModel(**SIZES))


@pytest.fixture
def theirs(base):
    return copy.deepcopy(base)


@pytest.fixture
def ours(base) -> Transformer:
    """The same weights here, copied by the rules."""
    config = TransformerConfig(**SIZES)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return filled(model, cogvideox.transformer(2), base)


@pytest.fixture
def written(theirs, tmp_path):
    """The paper's adapter in a file that states no alpha, and what the adapted model answers at alpha = rank."""
    model, _ = peft(theirs)
    path = tmp_path / "pytorch_lora_weights_transformer.safetensors"
    save_file(tensors_of(model), path)
    return path, run_theirs(model)


@pytest.fixture
def trained(ours):
    """Our model with an adapter at alpha = 3/4 rank, A and B at random."""
    config = lora.LoraConfig(rank=RANK, alpha=0.75 * RANK, targets=PAPER, dropout=0.2)
    lora.add(ours, config, names=NAMES, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for _, layer in lora.adapted(ours):
        layer.lora.b.set_value(jnp.asarray(rng.normal(0, 0.3, layer.lora.b.shape), jnp.float32))
    return ours
