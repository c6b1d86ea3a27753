"""The config file's errors, and the identities training relies on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import Schedule, SchedulerConfig
from sdv_jax.errors import UserError

FILE = {
    "_class_name": "CogVideoXDDIMScheduler",
    "_diffusers_version": "0.31.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
SCHEDULE = Schedule(SchedulerConfig.from_dict(FILE))


def _random(seed=0, shape=(1000, 2, 3)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_config_file_round_trip():
    without_version = {key: value for key, value in FILE.items() if key != "_diffusers_version"}
    assert SchedulerConfig.from_dict(FILE).to_dict() == without_version
    betas = {**FILE, "trained_betas": [0.01] * 1000}
    config = SchedulerConfig.from_dict(betas)
    assert SchedulerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(SchedulerConfig.from_dict(betas))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"_class_name": "EulerDiscreteScheduler"},
            ["EulerDiscreteScheduler", "CogVideoXDDIMScheduler", "DPMScheduler"],
        ),
        ({"_class_name": None}, ["None", "CogVideoXDDIMScheduler"]),
        ({"thresholding": True}, ["thresholding", "no setting"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid", "scaled_linear"]),
        ({"prediction_type": "flow"}, ["prediction_type", "flow", "v_prediction"]),
        ({"timestep_spacing": 3}, ["timestep_spacing", "3", "trailing"]),
        ({"num_train_timesteps": "1000"}, ["num_train_timesteps", "'1000'", "integer"]),
        ({"num_train_timesteps": 1}, ["num_train_timesteps", "at least 2"]),
        ({"steps_offset": True}, ["steps_offset", "integer"]),
        ({"beta_start": 0.1}, ["beta_start", "beta_end", "0.1"]),
        ({"beta_end": float("nan")}, ["beta_end", "nan"]),
        ({"snr_shift_scale": 0}, ["snr_shift_scale", "positive"]),
        ({"trained_betas": [0.1, 0.2]}, ["trained_betas", "2 entries", "1000"]),
        ({"trained_betas": [0.0] * 1000}, ["trained_betas", "between 0 and 1"]),
        ({"trained_betas": ["x"] * 1000}, ["trained_betas", "numbers"]),
        ({"trained_betas": "0.1"}, ["trained_betas", "list"]),
        ({"rescale_betas_zero_snr": "yes"}, ["rescale_betas_zero_snr", "true or false"]),
    ],
)
def test_config_errors_are_one_line(change, words):
    with pytest.raises(UserError) as error:
        SchedulerConfig.from_dict({**FILE, **change})
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_config_needs_a_class():
    with pytest.raises(UserError, match="_class_name"):
        SchedulerConfig.from_dict({key: value for key, value in FILE.items() if key != "_class_name"})


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_count_out_of_range(steps):
    with pytest.raises(UserError, match=r"1\.\.1000"):
        SCHEDULE.timesteps(steps)


def test_offset_out_of_range():
    config = dataclasses.replace(SCHEDULE.config, timestep_spacing="leading", steps_offset=100)
    with pytest.raises(UserError, match="steps_offset 100"):
        Schedule(config).timesteps(50)


def test_equal_configs_are_one_static_argument():
    traces = []

    def count(x, schedule):
        traces.append(schedule)
        return schedule.add_noise(x, x, jnp.zeros(len(x), int))

    count = jax.jit(count, static_argnames="schedule")
    for _ in range(2):
        count(_random(shape=(2, 3)), schedule=Schedule(SchedulerConfig.from_dict(FILE)))
    assert len(traces) == 1


def test_zero_terminal_snr_is_exact():
    assert SCHEDULE.alphas_cumprod[-1] == 0 and float(SCHEDULE.snr(jnp.array([999]))[0]) == 0
    x0, noise, last = _random(shape=(1, 5)), _random(1, (1, 5)), jnp.array([999])
    np.testing.assert_array_equal(SCHEDULE.add_noise(x0, noise, last), noise)
    np.testing.assert_array_equal(SCHEDULE.velocity(x0, noise, last), -x0)


def test_target_is_the_velocity_and_only_that():
    x0, noise, t = _random(), _random(1), jnp.arange(1000)
    np.testing.assert_array_equal(SCHEDULE.target(x0, noise, t), SCHEDULE.velocity(x0, noise, t))
    schedule = Schedule(dataclasses.replace(SCHEDULE.config, prediction_type="epsilon"))
    with pytest.raises(UserError, match="prediction_type epsilon cannot be trained, expected v_prediction"):
        schedule.target(x0, noise, t)


def test_velocity_gives_back_x0_at_every_timestep():
    x0, noise, t = _random(), _random(1), jnp.arange(1000)
    back = SCHEDULE.predict_x0(SCHEDULE.velocity(x0, noise, t), SCHEDULE.add_noise(x0, noise, t), t)
    np.testing.assert_allclose(back, x0, atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_other_predictions_give_back_x0(prediction_type):
    schedule = Schedule(dataclasses.replace(SCHEDULE.config, prediction_type=prediction_type))
    x0, noise, t = _random(shape=(900, 4)), _random(1, (900, 4)), jnp.arange(900)
    prediction = noise if prediction_type == "epsilon" else x0
    np.testing.assert_allclose(schedule.predict_x0(prediction, schedule.add_noise(x0, noise, t), t), x0, atol=1e-4)


def test_weighted_x0_error_is_plain_velocity_error():
    """mean(w (x0_hat - x0)^2) = mean((v_hat - v)^2), at every timestep, zero terminal SNR included."""
    x0, noise, v_hat, t = _random(), _random(1), _random(2), jnp.arange(1000)
    x_t, v = SCHEDULE.add_noise(x0, noise, t), SCHEDULE.velocity(x0, noise, t)
    weight = SCHEDULE.loss_weight(t)
    assert np.isfinite(weight).all() and float(weight[-1]) == 1.0
    weighted = weight * jnp.mean((SCHEDULE.predict_x0(v_hat, x_t, t) - x0) ** 2, axis=(1, 2))
    np.testing.assert_allclose(weighted, jnp.mean((v_hat - v) ** 2, axis=(1, 2)), rtol=2e-3)
    np.testing.assert_allclose(weighted.mean(), jnp.mean((v_hat - v) ** 2), rtol=1e-5)


def test_dtype_follows_the_clean_latents():
    x0, noise, t = _random(shape=(4, 3)).astype(jnp.bfloat16), _random(1, (4, 3)), jnp.arange(4)
    assert SCHEDULE.add_noise(x0, noise, t).dtype == jnp.bfloat16
    assert SCHEDULE.velocity(x0, noise, t).dtype == jnp.bfloat16


def test_snr_falls():
    assert (np.diff(np.asarray(SCHEDULE.snr(jnp.arange(1000)))) < 0).all()
