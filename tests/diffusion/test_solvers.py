"""Properties of the solvers that hold whatever the network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import DPM, Schedule, SchedulerConfig, flow, make_solver
from sdv_jax.diffusion.classes import SOLVERS
from sdv_jax.diffusion.schedules import CLASS_NAMES
from sdv_jax.errors import UserError

CONFIG = SchedulerConfig(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
)
SHAPE = (2, 3, 4, 5, 6)


def _config(class_name, **changes):
    return dataclasses.replace(CONFIG, class_name=class_name, **changes)


def _run(solver, x, velocity, noise):
    @jax.jit
    def step(state, x, i):
        t = jnp.full(len(x), jnp.asarray(solver.timesteps)[i])
        return solver.step(state, velocity(x, t), x, i, noise[i])

    state = solver.init(x)
    for i in range(solver.steps):
        state, x = step(state, x, i)
    return x


def test_every_known_class_has_a_solver():
    assert list(SOLVERS) == [*CLASS_NAMES, *flow.CLASS_NAMES]


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_a_perfect_network_reaches_the_data(class_name, steps):
    """The velocity that points at one x_0 leads there from any noise, in any number of steps."""
    solver, schedule = make_solver(_config(class_name), steps), Schedule(CONFIG)
    x0, x = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(2))
    noise = jax.random.normal(jax.random.key(2), (steps, *SHAPE))

    def velocity(x, t):
        kept = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t].reshape(-1, 1, 1, 1, 1)
        return (jnp.sqrt(kept) * x - x0) / jnp.sqrt(1 - kept)

    np.testing.assert_allclose(_run(solver, x, velocity, noise), x0, atol=1e-5)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_gaussian_data_stays_gaussian(class_name):
    """For standard normal data x_t is standard normal and E[v | x] = 0: the variance has to stay 1 down to the end."""
    steps = 50
    solver = make_solver(_config(class_name), steps)
    x = jax.random.normal(jax.random.key(0), (1, 20000))
    noise = jax.random.normal(jax.random.key(1), (steps, 1, 20000))
    step, state, levels = jax.jit(solver.step), solver.init(x), []
    for i in range(steps):
        state, x = step(state, jnp.zeros_like(x), x, i, noise[i])
        levels.append(float(jnp.std(x)))
    np.testing.assert_allclose(levels, 1, atol=0.05)  # what 50 steps leave of the exact solution, and the sample's size


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_jit_equals_eager(class_name):
    solver = make_solver(_config(class_name), 7)
    x, v, noise = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(3))
    for i in range(7):
        eager, traced = (step(solver.init(x), v, x, i, noise) for step in (solver.step, jax.jit(solver.step)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, traced)


def test_latents_keep_their_dtype_and_the_estimate_is_float32():
    solver = DPM(CONFIG, 3)
    x = jnp.ones(SHAPE, jnp.bfloat16)
    state, x = solver.step(solver.init(x), x, x, 0, jnp.zeros(SHAPE))
    assert x.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_where_dpm_is_second_order():
    assert DPM(CONFIG, 4).second_order.tolist() == [False, True, True, False]
    assert DPM(CONFIG, 7).second_order.tolist() == [False, *[True] * 6]  # 142 - 1000 // 7 = 0 is not past the end
    assert DPM(CONFIG, 1).second_order.tolist() == [False]


def test_dpm_adds_no_noise_in_its_last_step():
    assert DPM(CONFIG, 20).coefficients["noise"][-1] == 0


def test_epsilon_from_pure_noise_is_refused():
    with pytest.raises(UserError, match="epsilon cannot start from zero terminal SNR"):
        make_solver(_config("CogVideoXDDIMScheduler", prediction_type="epsilon"), 10)
    leading = _config("CogVideoXDDIMScheduler", prediction_type="epsilon", timestep_spacing="leading")
    assert make_solver(leading, 10).steps == 10


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_impossible_step_counts_are_refused(class_name):
    for steps in (0, 1001):
        with pytest.raises(UserError, match="steps must be in"):
            make_solver(_config(class_name), steps)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_every_step_count_has_finite_coefficients(class_name):
    for steps in range(1, 1001, 13):
        assert make_solver(_config(class_name), steps).timesteps.shape == (steps,)
