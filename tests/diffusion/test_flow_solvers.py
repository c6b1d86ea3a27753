"""Properties of the flow solvers that hold whatever the network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import FlowSchedule, FlowSchedulerConfig, make_solver
from sdv_jax.diffusion.flow import CLASS_NAMES, EULER, UNIPC
from sdv_jax.errors import UserError

SHAPE = (2, 3, 4, 5, 6)
EVERY_UNIPC = [
    dict(solver_order=order, solver_type=kind, **rest)
    for order, kind, rest in itertools.product(
        (1, 2, 3), ("bh1", "bh2"), ({}, {"disable_corrector": (0, 2)}, {"final_sigmas_type": "sigma_min"})
    )
]
EVERY = [(EULER, {}), *((UNIPC, settings) for settings in EVERY_UNIPC)]


def _solver(class_name, steps, **settings):
    return make_solver(FlowSchedulerConfig(class_name, **{"flow_shift": 3.0, **settings}), steps)


def _levels(solver):
    return FlowSchedule(solver.config).sigmas(solver.steps)


def _run(solver, x, velocity):
    """Every step with `velocity(x, level)`, not compiled since that costs more; the latents after each."""
    state, levels, visited = solver.init(x), _levels(solver), []
    for i in range(solver.steps):
        state, x = solver.step(state, velocity(x, float(levels[i])), x, i)
        visited.append(x)
    return visited


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize(("class_name", "settings"), EVERY)
def test_a_straight_flow_is_solved_exactly(class_name, settings, steps):
    """The velocity that points at one x_0 keeps to the straight line between it and the noise, in any step count."""
    solver = _solver(class_name, steps, **settings)
    x0, noise = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(2))
    levels = _levels(solver)
    visited = _run(solver, (1 - levels[0]) * x0 + levels[0] * noise, lambda x, level: (x - x0) / level)
    for x, level in zip(visited, levels[1:], strict=True):
        np.testing.assert_allclose(x, (1 - level) * x0 + level * noise, atol=5e-5)


@pytest.mark.parametrize("settings", EVERY_UNIPC)
def test_weights_of_unipc_keep_to_the_line(settings):
    """What the previous test says of one network, of the tables: no weight is lost between the estimates."""
    solver = _solver(UNIPC, 12, **settings)
    c, levels = solver.coefficients, _levels(solver).astype(np.float64)
    here, there = levels[:-1], levels[1:]
    np.testing.assert_allclose(c["keep"], there / here, rtol=1e-5)
    np.testing.assert_allclose((1 - here) * c["keep"] + c["ahead"].sum(1), 1 - there, atol=1e-5)
    i = np.flatnonzero(solver.corrects)
    np.testing.assert_allclose(c["before"][i], levels[i] / levels[i - 1], rtol=1e-5)
    total = (1 - levels[i - 1]) * c["before"][i] + c["newest"][i] + c["older"][i].sum(1)
    np.testing.assert_allclose(total, 1 - levels[i], atol=1e-5)


def test_first_order_unipc_without_corrector_is_euler():
    """On the same levels the two are one formula."""
    steps = 10
    solver = _solver(UNIPC, steps, solver_order=1, disable_corrector=tuple(range(steps)))
    levels = _levels(solver)
    x = jax.random.normal(jax.random.key(0), SHAPE)

    def velocity(x, level):
        return jnp.tanh(2 * x + level) - 0.3 * x

    for i, ours in enumerate(_run(solver, x, velocity)):
        x = x + float(levels[i + 1] - levels[i]) * velocity(x, float(levels[i]))
        np.testing.assert_allclose(ours, x, atol=1e-5)


def test_euler_adds_up_the_velocities():
    solver = _solver(EULER, 7)
    levels, x = _levels(solver), jnp.zeros((1, 3))
    result = _run(solver, x, lambda x, level: jnp.full_like(x, 2.5))[-1]
    np.testing.assert_allclose(result, 2.5 * (levels[-1] - levels[0]), rtol=1e-6)


def test_higher_order_is_closer_to_the_exact_solution():
    """Gaussian data of variance 0.3: x_s / sqrt(s^2 + 0.3 (1 - s)^2) is constant along the exact flow."""

    def velocity(x, level):
        return (level - (1 - level) * 0.3) / (level**2 + (1 - level) ** 2 * 0.3) * x

    def error(class_name, steps=40, **settings):
        result = _run(_solver(class_name, steps, **settings), jnp.ones((1, 1)), velocity)[-1]
        return abs(float(result[0, 0]) / 0.3**0.5 - 1)

    first, second, third = (error(UNIPC, solver_order=order) for order in (1, 2, 3))
    uncorrected = error(UNIPC, solver_order=2, disable_corrector=tuple(range(40)))
    assert third < second < first < error(EULER) < 0.08 and second < uncorrected and second < 0.005
    assert error(EULER, 20) / error(EULER, 40) == pytest.approx(2, rel=0.05)  # order 1


def test_orders_warm_up_and_come_down():
    assert _solver(UNIPC, 6, solver_order=3).orders.tolist() == [1, 2, 3, 3, 2, 1]
    assert _solver(UNIPC, 4).orders.tolist() == [1, 2, 2, 1]
    assert _solver(UNIPC, 2, solver_order=3).orders.tolist() == [1, 1]
    free = _solver(UNIPC, 4, solver_order=3, lower_order_final=False, final_sigmas_type="sigma_min")
    assert free.orders.tolist() == [1, 2, 3, 3]


def test_where_unipc_corrects():
    assert _solver(UNIPC, 4).corrects.tolist() == [False, True, True, True]
    solver = _solver(UNIPC, 4, disable_corrector=(0, 2, 17))
    assert solver.corrects.tolist() == [False, False, True, False]
    assert solver.coefficients["own"].tolist() == [1, 1, 0, 1]


def test_high_order_in_the_last_step_is_refused():
    with pytest.raises(UserError, match="lower_order_final false divides by zero") as error:
        _solver(UNIPC, 5, lower_order_final=False)
    assert "\n" not in str(error.value)
    for allowed in (dict(solver_order=1), dict(final_sigmas_type="sigma_min")):
        assert _solver(UNIPC, 5, lower_order_final=False, **allowed).steps == 5


@pytest.mark.parametrize(("class_name", "settings"), EVERY)
def test_last_step(class_name, settings):
    """With the final level 0 the result is the last estimate of x_0, with `sigma_min` the last step changes nothing."""
    solver = _solver(class_name, 5, **settings)
    x, p, state = jnp.full((1, 2), 2.0), jnp.full((1, 2), 3.0), solver.init(jnp.zeros((1, 2)))
    result = solver.step(state, p, x, 4)[1]
    if settings.get("final_sigmas_type") == "sigma_min":
        assert solver.coefficients["keep"][-1] == 1 and not solver.coefficients["ahead"][-1].any()
    elif class_name == UNIPC:
        assert solver.coefficients["keep"][-1] == 0 and solver.coefficients["ahead"][-1].tolist()[0] == 1
    else:
        np.testing.assert_allclose(result, x - _levels(solver)[4] * p, rtol=1e-6)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_jit_equals_eager_and_no_noise_is_read(class_name):
    solver = _solver(class_name, 7)
    x, v, noise = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(3))
    assert not solver.stochastic
    for i in range(7):
        eager = solver.step(solver.init(x), v, x, i)
        traced = jax.jit(solver.step)(solver.init(x), v, x, i, noise)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, traced)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_latents_keep_their_dtype_and_memory_is_float32_of_one_shape(class_name):
    solver = _solver(class_name, 3)
    x = jnp.ones(SHAPE, jnp.bfloat16)
    state = solver.init(x)
    after, x = solver.step(state, x, x, 0)
    assert x.dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_step_counts(class_name):
    for steps in (0, 1001):
        with pytest.raises(UserError, match="steps must be in"):
            _solver(class_name, steps)
    for steps in range(1, 1001, 111):
        assert _solver(class_name, steps, flow_shift=12.0).timesteps.shape == (steps,)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_equal_solvers_are_one_static_argument(class_name):
    one, same, other = (_solver(class_name, steps) for steps in (5, 5, 6))
    assert one == same and hash(one) == hash(same) and one != other
