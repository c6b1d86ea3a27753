"""The optimiser of a run: clip -> direction (AdamW or Muon) -> decoupled decay -> learning rate."""

import jax
import jax.numpy as jnp
import optax

from sdv_jax.train.config import Optimizer

# Leaves that decay: matrices and LoRA factors, known by name because stacking gives every leaf a leading layer axis.
MATRICES = ("kernel", "embedding", "a", "b")


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then cosine with hard restarts to 0, or constant.

    The cosine is transformers' `get_cosine_with_hard_restarts_schedule_with_warmup`: after the warm-up, progress runs
    from 0 to 1 at `decay_steps` (or `steps`), and the rate is peak · (1 + cos(π · frac(cycles · progress))) / 2.
    """
    end = config.decay_steps or steps

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.where(step < config.warmup, step / max(1, config.warmup), 1.0)
        if config.schedule == "constant":
            return config.learning_rate * warm
        progress = (step - config.warmup) / max(1, end - config.warmup)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * ((config.cycles * jnp.clip(progress, 0, 1)) % 1.0)))
        return config.learning_rate * warm * jnp.where(progress < 1, cosine, 0.0)

    return schedule


def make(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """The gradient transformation over a nested dict of trained leaves, as `state.create` makes it."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _direction(config: Optimizer) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "adamw":
        return adam
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=_orthogonalised)
    return optax.partition({"muon": optax.chain(muon, _like_adam()), "adam": adam}, _labels)


def _like_adam() -> optax.GradientTransformation:
    """An orthogonal update at root mean square 0.2, for Muon to share Adam's rate (arXiv 2502.16982, section 2.2)."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * max(u.shape[1:]) ** 0.5 * u, updates))


def _name(path) -> str:
    return path[-1].key


def _decays(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in MATRICES, params)


def _is_block_matrix(path, leaf) -> bool:
    return _name(path) == "kernel" and leaf.ndim == 3 and any(key.key == "blocks" for key in path)


def _labels(params):
    return jax.tree_util.tree_map_with_path(lambda p, x: "muon" if _is_block_matrix(p, x) else "adam", params)


def _orthogonalised(params):
    """Each layer's [in, out] matrix of a stacked [l, in, out] kernel is orthogonalised on its own."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), params)
