"""The noise levels training draws, for both kinds of schedule."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import FlowSchedule, FlowSchedulerConfig, Schedule, SchedulerConfig, draw_timesteps, shifted
from sdv_jax.errors import UserError

DISCRETE = Schedule(SchedulerConfig(prediction_type="v_prediction"))
FLOW = FlowSchedule(FlowSchedulerConfig(flow_shift=5.0))
KEY = jax.random.key(0)
UNIFORM, NORMAL = [789, 0, 712, 373, 771, 347], [949, 971, 462, 594, 682, 277]  # of KEY


def test_discrete_draws_never_change():
    """Recorded numbers: a run that resumes has to draw what it would have drawn."""
    uniform = draw_timesteps(KEY, 6, schedule=DISCRETE)
    normal = draw_timesteps(KEY, 6, schedule=DISCRETE, law="logit_normal", logit_mean=0.5, logit_std=1.5)
    assert uniform.tolist() == UNIFORM and normal.tolist() == NORMAL
    assert uniform.dtype == normal.dtype == jnp.int32


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_discrete_draws_stay_in_range(law):
    drawn = draw_timesteps(KEY, 20000, schedule=DISCRETE, law=law, logit_std=30.0)
    assert drawn.min() == 0 and drawn.max() == 999


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_flow_levels_lie_between_data_and_noise(law):
    drawn = draw_timesteps(KEY, 20000, schedule=FLOW, law=law)
    assert drawn.dtype == jnp.float32 and drawn.shape == (20000,)
    assert drawn.min() > 0 and drawn.max() <= 1000
    assert len(np.unique(drawn)) > 19000  # a continuum, not the 1000 integers


def test_uniform_flow_levels_are_uniform_before_the_shift():
    levels = np.sort(draw_timesteps(KEY, 20000, schedule=FLOW, shift=1.0)) / 1000
    np.testing.assert_allclose(levels, (np.arange(20000) + 0.5) / 20000, atol=0.015)


def test_logit_normal_has_its_quantiles():
    drawn = draw_timesteps(KEY, 20000, schedule=FLOW, law="logit_normal", logit_mean=0.5, logit_std=2.0, shift=1.0)
    levels = np.asarray(drawn, np.float64) / 1000
    logits = np.log(levels / (1 - levels))
    np.testing.assert_allclose([logits.mean(), logits.std()], [0.5, 2.0], atol=0.05)


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_shift_is_the_file_s_unless_given(law):
    plain = draw_timesteps(KEY, 100, schedule=FLOW, law=law, shift=1.0)
    from_file = draw_timesteps(KEY, 100, schedule=FLOW, law=law)
    given = draw_timesteps(KEY, 100, schedule=FLOW, law=law, shift=3.0)
    np.testing.assert_allclose(from_file, 1000 * shifted(plain / 1000, 5.0), rtol=1e-5)
    np.testing.assert_allclose(given, 1000 * shifted(plain / 1000, 3.0), rtol=1e-5)
    assert (from_file > given).all() and (given > plain).all()


def test_jit_equals_eager():
    for schedule in (DISCRETE, FLOW):
        draw = partial(draw_timesteps, batch=50, schedule=schedule, law="logit_normal")
        np.testing.assert_allclose(jax.jit(draw)(KEY), draw(KEY), rtol=1e-5)


def test_errors():
    with pytest.raises(UserError, match="unknown law 'cosine'; known: uniform, logit_normal"):
        draw_timesteps(KEY, 2, schedule=FLOW, law="cosine")
    with pytest.raises(UserError, match="flow_shift must be a positive number, found 0"):
        draw_timesteps(KEY, 2, schedule=FLOW, shift=0)
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler has no shift"):
        draw_timesteps(KEY, 2, schedule=DISCRETE, shift=3.0)
