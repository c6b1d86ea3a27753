"""Flow schedules and solvers against the schedulers of diffusers, which run the loop of its Wan pipeline."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import (
    FlowSchedule,
    FlowSchedulerConfig,
    classifier_free,
    make_solver,
    run,
    sample,
    scheduler_config,
    two_expert_scales,
)
from sdv_jax.diffusion.flow import CLASS_NAMES, EULER, UNIPC
from tests.parity.compare import assert_close

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

SHAPE = (2, 3, 4, 6, 4)  # b t h w c
SHIFTS = [1.0, 3.0, 5.0, 8.0, 12.0]
STEPS = [1, 2, 3, 5, 20, 50]
WAN_21 = {
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995, "final_sigmas_type": "zero", "flow_shift": 3.0, "lower_order_final": True,
    "num_train_timesteps": 1000, "predict_x0": True, "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "solver_order": 2, "solver_p": None,
    "solver_type": "bh2", "steps_offset": 0, "thresholding": False, "timestep_spacing": "linspace",
    "trained_betas": None, "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}  # fmt: skip
WAN_22 = {**WAN_21, "time_shift_type": "exponential", "use_dynamic_shifting": False}
PUBLISHED = {
    "Wan2.1-T2V-1.3B": WAN_21,
    "Wan2.1-T2V-14B": WAN_21,
    "Wan2.2-T2V-A14B": WAN_22,
    "Wan2.2-TI2V-5B": {**WAN_22, "flow_shift": 5.0},
}
SETTINGS = {  # of UniPC
    "order 1": {"solver_order": 1},
    "order 3": {"solver_order": 3},
    "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "bh1 order 3": {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "some correctors off": {"disable_corrector": [0, 2, 3]},
    "all correctors off, order 3": {"disable_corrector": list(range(50)), "solver_order": 3},
    "high order to the end": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "short training": {"num_train_timesteps": 100},
    "no effect": {"timestep_spacing": "trailing", "steps_offset": 1, "beta_schedule": "scaled_linear"},
}
WEIGHTS = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
LATENTS = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def _both(class_name: str, settings: dict, steps: int):
    """Our config and their scheduler, as the pipeline prepares it."""
    theirs = getattr(diffusers, class_name)(**settings)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    return scheduler_config({"_class_name": class_name, **settings}), theirs


def _network(module, weights):
    """A small nonlinear network of x and t, in numpy-like calls both libraries have."""
    return lambda x, t: module.tanh(x @ weights + 0.001 * t) - 0.3 * x


def _trajectories(class_name: str, settings: dict, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs), the latents after every step, each network fed with its own results."""
    config, theirs = _both(class_name, settings, steps)
    solver, network = make_solver(config, steps), _network(torch, torch.tensor(WEIGHTS))
    x, expected = torch.tensor(LATENTS), []
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), t, x, return_dict=False)[0]
        expected.append(x.numpy())

    x, ours = jnp.asarray(LATENTS), []
    state = solver.init(x)
    for i in range(steps):  # not compiled, since that costs more; whole loops below are
        state, x = solver.step(state, _network(jnp, WEIGHTS)(x, solver.timesteps[i]), x, i)
        ours.append(np.asarray(x))
    return np.stack(ours), np.stack(expected)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_settings_and_defaults_are_those_of_the_class(class_name):
    theirs = {
        name: list(entry.default) if isinstance(entry.default, tuple) else entry.default
        for name, entry in inspect.signature(getattr(diffusers, class_name)).parameters.items()
    }
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if class_name == UNIPC else {}
    ours = FlowSchedulerConfig.from_dict({"_class_name": class_name, **flow}).to_dict()
    assert ours == {"_class_name": class_name, **theirs, **flow}


@pytest.mark.parametrize("shift", [0.7, *SHIFTS])
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_levels_and_timesteps(class_name, shift):
    """Exactly equal, for counts that divide 1000 and others."""
    name = "shift" if class_name == EULER else "flow_shift"
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if class_name == UNIPC else {}
    for steps in [*range(1, 60), 333, 999, 1000]:
        config, theirs = _both(class_name, {name: shift, **flow}, steps)
        np.testing.assert_array_equal(FlowSchedule(config).sigmas(steps), theirs.sigmas.numpy())
        np.testing.assert_array_equal(FlowSchedule(config).timesteps(steps), theirs.timesteps.numpy())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_trajectory(shift, steps):
    ours, theirs = _trajectories(EULER, {"shift": shift}, steps)
    for x, expected in zip(ours, theirs, strict=True):
        assert_close(x, expected, 1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_unipc_trajectory(shift, steps):
    ours, theirs = _trajectories(UNIPC, {**WAN_21, "flow_shift": shift}, steps)
    for x, expected in zip(ours, theirs, strict=True):
        assert_close(x, expected, 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("name", SETTINGS)
def test_unipc_settings(name, steps):
    ours, theirs = _trajectories(UNIPC, {**WAN_21, **SETTINGS[name]}, steps)
    for x, expected in zip(ours, theirs, strict=True):
        assert_close(x, expected, 1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedulers(name):
    ours, theirs = _trajectories(UNIPC, PUBLISHED[name], 50)
    for x, expected in zip(ours, theirs, strict=True):
        assert_close(x, expected, 1e-5)


def test_last_step_of_bh1_is_the_limit_where_theirs_is_nan():
    settings = {**WAN_21, "solver_type": "bh1"}
    ours, theirs = _trajectories(UNIPC, settings, 5)
    assert_close(ours[:-1], theirs[:-1], 1e-5)
    assert np.isnan(theirs[-1]).all() and np.isfinite(ours[-1]).all()
    close, _ = _trajectories(UNIPC, {**settings, "solver_type": "bh2"}, 5)
    assert_close(ours[-1], close[-1], 0.2)


def test_noising_equals_theirs_at_their_timesteps():
    config, theirs = _both(EULER, {"shift": 3.0}, 10)
    theirs._begin_index = None  # as in training: levels are looked up by timestep
    x0, noise = np.random.default_rng(3).standard_normal((2, 10, 3, 4)).astype(np.float32)
    expected = theirs.scale_noise(torch.tensor(x0), theirs.timesteps, torch.tensor(noise))
    ours = FlowSchedule(config).add_noise(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(theirs.timesteps.numpy()))
    assert_close(ours, expected, 1e-6)


def _conditions():
    shape = (2, 1, 1, 1, 1)
    positive = {"add": jnp.zeros(shape), "mul": jnp.full(shape, 0.2)}
    return positive, {"add": jnp.full(shape, 0.1), "mul": jnp.zeros(shape)}


def _predict(weights):
    def predict(x, t, condition):
        network = _network(jnp, weights)
        return network(x, t[:, None, None, None, None]) + condition["add"] + condition["mul"] * x

    return predict


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_whole_loop_with_guidance(class_name):
    """`sample` as one scan, guidance as diffusers computes it."""
    steps, scale = 20, 5.0
    config, theirs = _both(class_name, PUBLISHED["Wan2.2-TI2V-5B"] if class_name == UNIPC else {"shift": 5.0}, steps)
    x, network = torch.tensor(LATENTS), _network(torch, torch.tensor(WEIGHTS))
    for t in theirs.timesteps:
        without, with_text = network(x, t) + 0.1, network(x, t) + 0.2 * x
        x = theirs.step(without + scale * (with_text - without), t, x, return_dict=False)[0]
    positive, negative = _conditions()
    denoise = classifier_free(_predict(WEIGHTS), positive, negative=negative)
    ours = jax.jit(lambda x: sample(denoise, make_solver(config, steps), x, guidance=scale))(jnp.asarray(LATENTS))
    assert_close(ours, x, 1e-4)


@pytest.mark.parametrize("steps", [7, 40])
def test_two_experts_in_two_phases(steps):
    """Wan 2.2 A14B: another network and another scale below timestep 875, one phase each."""
    boundary, high, low = 875.0, 4.0, 3.0
    config, theirs = _both(UNIPC, {**WAN_22, "flow_shift": 12.0}, steps)
    experts = WEIGHTS, 0.5 * WEIGHTS.T.copy()
    x = torch.tensor(LATENTS)
    for t in theirs.timesteps:
        weights, scale = (experts[0], high) if t >= boundary else (experts[1], low)
        network = _network(torch, torch.tensor(weights))
        without, with_text = network(x, t) + 0.1, network(x, t) + 0.2 * x
        x = theirs.step(without + scale * (with_text - without), t, x, return_dict=False)[0]

    solver, (positive, negative) = make_solver(config, steps), _conditions()
    scales, first_low = two_expert_scales(high, low, solver.timesteps, boundary)
    assert 0 < first_low < steps and first_low == int((theirs.timesteps >= boundary).sum())
    ours = jnp.asarray(LATENTS)
    carry = solver.init(ours), ours
    for weights, begin, end in ((experts[0], 0, first_low), (experts[1], first_low, steps)):
        denoise = classifier_free(_predict(weights), positive, negative=negative)
        carry = run(denoise, solver, carry, begin=begin, end=end, guidance=scales)
    assert_close(carry[1], x, 1e-4)


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_files_that_diffusers_makes_when_the_class_changes(shift):
    """`from_config` leaves the old class's settings in the file, and reads them not."""
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=7.0)
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(unipc.config, shift=shift)
    back = diffusers.UniPCMultistepScheduler.from_config(euler.config)
    for theirs in (euler, back):
        saved = {"_class_name": type(theirs).__name__, **{k: v for k, v in theirs.config.items() if k[0] != "_"}}
        theirs.set_timesteps(6)
        found = FlowSchedule(scheduler_config(json.loads(json.dumps(saved)))).sigmas(6)
        np.testing.assert_allclose(found, theirs.sigmas.numpy(), rtol=1e-6)
