"""The flow schedulers' files and their errors, and the identities of the straight line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import (
    FlowSchedule,
    FlowSchedulerConfig,
    Schedule,
    SchedulerConfig,
    noise_schedule,
    scheduler_config,
    shifted,
    with_flow_shift,
)
from sdv_jax.diffusion.classes import SOLVERS
from sdv_jax.diffusion.flow import CLASS_NAMES, EULER, UNIPC
from sdv_jax.errors import UserError

WAN = {  # Wan 2.1; 2.2 adds time_shift_type and use_dynamic_shifting
    "_class_name": UNIPC,
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
SD3 = {"_class_name": EULER, "_diffusers_version": "0.29.0", "num_train_timesteps": 1000, "shift": 3.0}
SCHEDULE = FlowSchedule(FlowSchedulerConfig.from_dict(WAN))


def _random(seed=0, shape=(6, 2, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_wan_file_round_trip():
    config = FlowSchedulerConfig.from_dict(WAN)
    kept = config.to_dict()
    assert {key: kept[key] for key in WAN if key != "_diffusers_version"} == {
        key: value for key, value in WAN.items() if key != "_diffusers_version"
    }
    assert kept["time_shift_type"] == "exponential" and kept["use_dynamic_shifting"] is False and "shift" not in kept
    assert (config.flow_shift, config.num_train_timesteps, config.prediction_type) == (3.0, 1000, "flow_prediction")


@pytest.mark.parametrize("entries", [{**WAN, "disable_corrector": [0, 3], "trained_betas": [0.1] * 1000}, SD3])
def test_round_trip_through_json(entries):
    config = scheduler_config(entries)
    assert scheduler_config(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(scheduler_config(entries))


def test_euler_file_calls_the_shift_shift():
    config = scheduler_config(SD3)
    assert config.flow_shift == 3.0 and config.prediction_type == "flow_prediction"
    assert config.to_dict()["shift"] == 3.0 and "flow_shift" not in config.to_dict()


def test_changing_the_class_keeps_the_other_settings():
    config = FlowSchedulerConfig.from_dict({**WAN, "solver_order": 3})
    euler = dataclasses.replace(config, class_name=EULER)
    assert euler.flow_shift == 3.0 and "solver_order" not in euler.to_dict()
    assert dataclasses.replace(euler, class_name=UNIPC) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, ["EulerDiscreteScheduler", *CLASS_NAMES]),
        ({"shifts": 3.0}, ["no setting shifts", "flow_shift"]),
        ({"flow_shift": 0}, ["flow_shift", "positive", "0"]),
        ({"flow_shift": "3"}, ["flow_shift", "'3'"]),
        ({"flow_shift": float("inf")}, ["flow_shift", "inf"]),
        ({"use_flow_sigmas": False}, ["use_flow_sigmas false", "not implemented", "expected true"]),
        ({"use_flow_sigmas": 1}, ["use_flow_sigmas 1", "expected true"]),
        ({"prediction_type": "epsilon"}, ["prediction_type", '"epsilon"', '"flow_prediction"']),
        ({"predict_x0": False}, ["predict_x0 false", "expected true"]),
        ({"thresholding": True}, ["thresholding true", "expected false"]),
        ({"solver_p": {"_class_name": "X"}}, ["solver_p", "X", "expected null"]),
        ({"use_dynamic_shifting": True}, ["use_dynamic_shifting true", "expected false"]),
        ({"use_karras_sigmas": True}, ["use_karras_sigmas true", "expected false"]),
        ({"use_exponential_sigmas": True}, ["use_exponential_sigmas true"]),
        ({"use_beta_sigmas": True}, ["use_beta_sigmas true"]),
        ({"shift_terminal": 0.02}, ["shift_terminal 0.02", "expected null"]),
        ({"solver_type": "heun"}, ["solver_type", "heun", "bh1, bh2"]),
        ({"solver_order": 4}, ["solver_order", "4", "1, 2, 3"]),
        ({"solver_order": True}, ["solver_order", "integer", "True"]),
        ({"final_sigmas_type": "one"}, ["final_sigmas_type", "one", "sigma_min"]),
        ({"timestep_spacing": ["linspace"]}, ["timestep_spacing", "linspace"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid"]),
        ({"num_train_timesteps": 1000.0}, ["num_train_timesteps", "integer"]),
        ({"num_train_timesteps": 1}, ["num_train_timesteps", "at least 2"]),
        ({"lower_order_final": "yes"}, ["lower_order_final", "true or false"]),
        ({"disable_corrector": 3}, ["disable_corrector", "list", "3"]),
        ({"disable_corrector": ["0"]}, ["disable_corrector", "list"]),
        ({"trained_betas": "0.1"}, ["trained_betas", "list"]),
        ({"sample_max_value": None}, ["sample_max_value", "finite number", "None"]),
        ({"sigma_min": "low"}, ["sigma_min", "'low'"]),
    ],
)
def test_config_errors_are_one_line(change, words):
    with pytest.raises(UserError) as error:
        FlowSchedulerConfig.from_dict({**WAN, **change})
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("change", [{"stochastic_sampling": True}, {"invert_sigmas": True}, {"shift_terminal": 0.1}])
def test_unimplemented_settings_of_euler_are_refused(change):
    with pytest.raises(UserError, match=f"{next(iter(change))} .* is not implemented, expected"):
        FlowSchedulerConfig.from_dict({**SD3, **change})


def test_a_bare_unipc_file_is_no_flow():
    with pytest.raises(UserError, match="prediction_type"):
        FlowSchedulerConfig.from_dict({"_class_name": UNIPC})
    with pytest.raises(UserError, match="use_flow_sigmas"):
        FlowSchedulerConfig.from_dict({"_class_name": UNIPC, "prediction_type": "flow_prediction"})


def test_config_class_is_chosen_by_name():
    assert all(isinstance(scheduler_config(entries), FlowSchedulerConfig) for entries in (WAN, SD3))
    cog = scheduler_config({"_class_name": "CogVideoXDPMScheduler"})
    assert isinstance(cog, SchedulerConfig) and isinstance(noise_schedule(cog), Schedule)
    assert noise_schedule(scheduler_config(WAN)) == SCHEDULE
    for entries in ({**WAN, "_class_name": "PNDMScheduler"}, {}):
        with pytest.raises(UserError) as error:
            scheduler_config(entries)
        assert all(name in str(error.value) for name in SOLVERS) and "\n" not in str(error.value)


def test_another_shift():
    assert with_flow_shift(SCHEDULE.config, 8.0) == FlowSchedulerConfig.from_dict({**WAN, "flow_shift": 8.0})
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler has no shift"):
        with_flow_shift(SchedulerConfig(), 8.0)
    for bad in (0, -1.0, float("nan"), "8", True):
        with pytest.raises(UserError, match="flow_shift must be a positive number"):
            with_flow_shift(SCHEDULE.config, bad)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_shift_keeps_the_ends_and_the_order(shift):
    levels = np.linspace(0, 1, 101)
    moved = shifted(levels, shift)
    assert moved[0] == 0 and moved[-1] == 1 and (np.diff(moved) > 0).all()
    assert ((moved - levels) * (shift - 1) >= 0).all()
    np.testing.assert_allclose(shifted(moved, 1 / shift), levels, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_levels_fall_from_pure_noise_to_data(class_name, shift):
    schedule = FlowSchedule(FlowSchedulerConfig(class_name, flow_shift=shift))
    for steps in (1, 2, 5, 50, 1000):
        sigmas, timesteps = schedule.sigmas(steps), schedule.timesteps(steps)
        assert sigmas.shape == (steps + 1,) and timesteps.shape == (steps,) and sigmas.dtype == np.float32
        assert 1 - 2e-6 <= sigmas[0] <= 1 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
        assert (np.diff(timesteps) <= 0).all() and timesteps.max() <= 1000 and timesteps.min() >= 0
        assert np.abs(timesteps - 1000 * sigmas[:-1]).max() <= 1
        assert timesteps.dtype == (np.int32 if class_name == UNIPC else np.float32)


def test_last_level_of_sigma_min():
    schedule = FlowSchedule(dataclasses.replace(SCHEDULE.config, final_sigmas_type="sigma_min"))
    assert schedule.sigmas(5)[-1] == schedule.sigmas(5)[-2] > 0
    euler = FlowSchedule(dataclasses.replace(schedule.config, class_name=EULER))  # a setting of UniPC alone
    assert euler.sigmas(5)[-1] == 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_count_out_of_range(steps):
    with pytest.raises(UserError, match=r"1\.\.1000"):
        SCHEDULE.timesteps(steps)


def test_ends_of_the_line_are_data_and_noise():
    x0, noise = _random(shape=(2, 3)), _random(1, (2, 3))
    for t in (jnp.array([0, 1000]), jnp.array([0.0, 1000.0])):
        np.testing.assert_array_equal(SCHEDULE.add_noise(x0, noise, t), jnp.stack([x0[0], noise[1]]))


def test_target_gives_back_data_and_noise_at_every_level():
    x0, noise = _random(), _random(1)
    t = jnp.array([0.0, 0.5, 250.25, 500.0, 999.9, 1000.0])
    x_t, target = SCHEDULE.add_noise(x0, noise, t), SCHEDULE.target(x0, noise, t)
    np.testing.assert_allclose(SCHEDULE.predict_x0(target, x_t, t), x0, atol=2e-6)
    np.testing.assert_allclose(x_t + (1 - t[:, None, None] / 1000) * target, noise, atol=2e-6)


def test_the_target_is_the_line_s_direction():
    x0, noise, t = _random(), _random(1), jnp.full(6, 400.0)
    change = SCHEDULE.add_noise(x0, noise, t + 125) - SCHEDULE.add_noise(x0, noise, t)
    np.testing.assert_allclose(change / 0.125, SCHEDULE.target(x0, noise, t), atol=1e-5)


def test_levels_follow_the_number_of_train_timesteps():
    short = FlowSchedule(FlowSchedulerConfig(num_train_timesteps=100))
    x0, noise, t = _random(), _random(1), jnp.full(6, 40)
    np.testing.assert_allclose(short.add_noise(x0, noise, t), SCHEDULE.add_noise(x0, noise, 10 * t), atol=1e-6)


def test_dtype_follows_the_clean_latents():
    x0, noise, t = _random().astype(jnp.bfloat16), _random(1), jnp.arange(6)
    assert SCHEDULE.add_noise(x0, noise, t).dtype == SCHEDULE.target(x0, noise, t).dtype == jnp.bfloat16


def test_equal_configs_are_one_static_argument():
    traces = []

    def count(x, schedule):
        traces.append(schedule)
        return schedule.add_noise(x, x, jnp.zeros(len(x)))

    count = jax.jit(count, static_argnames="schedule")
    for _ in range(2):
        count(_random(), schedule=FlowSchedule(FlowSchedulerConfig.from_dict(WAN)))
    assert len(traces) == 1
