import jax
import numpy as np
import pytest

from sdv_jax.objectives import switching

KEY = jax.random.key(7)
STEPS = 4000


def test_the_host_schedule_is_what_each_step_says():
    schedule = switching.task_schedule(KEY, 40, 0.3)
    assert schedule.tolist() == [int(switching.task_at(KEY, step, 0.3)) for step in range(40)]
    dropped = switching.view_drop_schedule(KEY, 40, 0.5)
    assert dropped.tolist() == [bool(switching.view_dropped_at(KEY, step, 0.5)) for step in range(40)]


def test_a_longer_run_starts_with_the_shorter_one():
    np.testing.assert_array_equal(switching.task_schedule(KEY, 50, 0.2), switching.task_schedule(KEY, STEPS, 0.2)[:50])


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_motion_has_its_probability(p):
    share = switching.task_schedule(KEY, STEPS, p).mean()
    assert abs(share - p) <= 4 * np.sqrt(p * (1 - p) / STEPS)


def test_other_keys_switch_otherwise():
    other = switching.task_schedule(jax.random.key(8), STEPS, 0.2)
    assert (other != switching.task_schedule(KEY, STEPS, 0.2)).any()


def test_the_draws_of_a_step_are_independent():
    tasks = switching.task_schedule(KEY, STEPS, 0.5)
    dropped = switching.view_drop_schedule(KEY, STEPS, 0.5)
    assert abs(np.corrcoef(tasks, dropped)[0, 1]) < 0.07
    keys = {tuple(jax.random.key_data(switching.step_key(KEY, 3, purpose)).tolist()) for purpose in switching.Purpose}
    assert len(keys) == len(switching.Purpose)
