"""The loop: one scan, one compilation, guidance, noise from a key or from the user."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import (
    FlowSchedulerConfig,
    SchedulerConfig,
    classifier_free,
    conditional,
    dynamic_scale,
    make_solver,
    run,
    sample,
    two_expert_scales,
    uses_guidance,
)
from sdv_jax.diffusion.classes import SOLVERS
from sdv_jax.diffusion.schedules import CLASS_NAMES
from sdv_jax.errors import UserError

CONFIG = SchedulerConfig(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
)
SHAPE, STEPS = (2, 3, 4, 5, 6), 5
WEIGHTS = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)


def _solver(class_name, steps=STEPS):
    if class_name not in CLASS_NAMES:
        return make_solver(FlowSchedulerConfig(class_name, flow_shift=3.0), steps)
    return make_solver(dataclasses.replace(CONFIG, class_name=class_name), steps)


def _predict(latents, timesteps, condition):
    bias = (condition + 0.001 * timesteps)[:, None, None, None, None]
    return jnp.tanh(latents @ WEIGHTS + bias)


def _latents(seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), SHAPE, dtype)


def _noise():
    return jax.random.normal(jax.random.key(7), (STEPS, *SHAPE))


POSITIVE, NEGATIVE = jnp.array([0.3, -0.4]), jnp.zeros(2)


@pytest.mark.parametrize("class_name", SOLVERS)
def test_scan_equals_a_python_loop_and_jit_equals_eager(class_name):
    solver, noise = _solver(class_name), _noise()
    scales = dynamic_scale(6.0, solver.timesteps)
    denoise = classifier_free(_predict, POSITIVE, negative=NEGATIVE)
    x = _latents()
    state = solver.init(x)
    for i, t in enumerate(solver.timesteps):
        state, x = solver.step(state, denoise(x, jnp.full(2, t), scales[i]), x, i, noise[i])

    def whole(x, noise):
        return sample(denoise, solver, x, guidance=scales, step_noise=noise)

    np.testing.assert_allclose(whole(_latents(), noise), x, atol=1e-5)
    np.testing.assert_allclose(jax.jit(whole)(_latents(), noise), x, atol=1e-5)


def test_the_loop_is_one_scan():
    denoise = conditional(_predict, POSITIVE)
    jaxpr = jax.make_jaxpr(lambda x: sample(denoise, _solver(CLASS_NAMES[0]), x, guidance=1.0))(_latents())
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(scans) == 1 and scans[0].params["length"] == STEPS
    assert "callback" not in str(jaxpr)


def test_guidance_of_one_is_no_guidance():
    solver, x = _solver(CLASS_NAMES[0]), _latents()
    guided = sample(classifier_free(_predict, POSITIVE, negative=NEGATIVE), solver, x, guidance=1.0)
    plain = sample(conditional(_predict, POSITIVE), solver, x, guidance=1.0)
    np.testing.assert_allclose(guided, plain, atol=1e-5)
    assert [uses_guidance(scale) for scale in (0.0, 1.0, 1.5)] == [False, False, True]


def test_guidance_doubles_the_batch_negative_first_over_a_tree():
    seen = []

    def predict(latents, timesteps, condition):
        seen.append((latents.shape[0], timesteps.shape[0], condition["text"].tolist(), condition["same"].tolist()))
        return jnp.broadcast_to(condition["text"].reshape(-1, 1, 1, 1, 1), latents.shape).astype(jnp.bfloat16)

    denoise = classifier_free(
        predict,
        {"text": POSITIVE, "same": jnp.ones(2)},
        negative={"text": NEGATIVE - 1, "same": jnp.ones(2)},
    )
    result = denoise(_latents(), jnp.zeros(2, int), 3.0)
    assert seen[0][:2] == (4, 4) and seen[0][2][:2] == [-1, -1] and seen[0][3] == [1] * 4
    assert result.dtype == jnp.float32  # the prediction was bfloat16; guidance is done in float32
    np.testing.assert_allclose(result[:, 0, 0, 0, 0], -1 + 3 * (POSITIVE + 1), atol=3e-2)


def test_dynamic_scale_is_the_published_formula():
    scales = dynamic_scale(6.0, np.array([999, 500, 0]))
    expected = [1 + 6 * (1 - math.cos(math.pi * ((3 - t) / 3) ** 5)) / 2 for t in (999, 500, 0)]
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    assert scales[-1] == 7.0 and scales.dtype == np.float32


def test_noise_of_a_key_is_folded_per_step():
    solver, denoise, key = _solver("CogVideoXDPMScheduler"), conditional(_predict, POSITIVE), jax.random.key(3)
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in range(STEPS)])
    first, second = (sample(denoise, solver, _latents(), guidance=1.0, key=key) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, sample(denoise, solver, _latents(), guidance=1.0, step_noise=drawn), atol=1e-6)
    other = sample(denoise, solver, _latents(), guidance=1.0, key=jax.random.key(4))
    assert float(jnp.abs(first - other).max()) > 0.01


def test_step_noise_wins_over_the_key_and_ddim_reads_neither():
    denoise = conditional(_predict, POSITIVE)
    dpm, ddim = _solver("CogVideoXDPMScheduler"), _solver("CogVideoXDDIMScheduler")
    given = sample(denoise, dpm, _latents(), guidance=1.0, step_noise=_noise())
    both = sample(denoise, dpm, _latents(), guidance=1.0, step_noise=_noise(), key=jax.random.key(0))
    np.testing.assert_array_equal(given, both)
    plain = sample(denoise, ddim, _latents(), guidance=1.0)
    np.testing.assert_array_equal(plain, sample(denoise, ddim, _latents(), guidance=1.0, step_noise=_noise()))


def test_equal_shapes_compile_once():
    traces = []

    def generate(x, condition, scale, key, *, solver):
        traces.append(1)
        return sample(conditional(_predict, condition), solver, x, guidance=scale, key=key)

    generate = jax.jit(generate, static_argnames="solver")
    for seed in range(3):
        generate(_latents(seed), POSITIVE, 1.0 + seed, jax.random.key(seed), solver=_solver("CogVideoXDPMScheduler"))
    assert len(traces) == 1


def test_progress_reports_every_step():
    seen = []
    run = jax.jit(
        lambda x: sample(
            conditional(_predict, POSITIVE),
            _solver(CLASS_NAMES[0]),
            x,
            guidance=1.0,
            progress=lambda done, steps: seen.append((done, steps)),
        )
    )
    run(_latents()).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [(i + 1, STEPS) for i in range(STEPS)]


@pytest.mark.parametrize(
    ("class_name", "source"), [*((name, "step_noise") for name in SOLVERS), ("CogVideoXDPMScheduler", "key")]
)
def test_phases_are_the_whole(class_name, source):
    """Cut anywhere, even at the ends: memory, scales, timesteps and noise go on over the boundary."""
    solver, denoise = _solver(class_name), classifier_free(_predict, POSITIVE, negative=NEGATIVE)
    noise = {"key": jax.random.key(5)} if source == "key" else {"step_noise": _noise()}
    scales = np.linspace(1, 7, STEPS)
    carry = solver.init(_latents()), _latents()
    for begin, end in ((0, 0), (0, 2), (2, 3), (3, 5), (5, 5)):
        carry = run(denoise, solver, carry, begin=begin, end=end, guidance=scales, **noise)
    np.testing.assert_allclose(carry[1], sample(denoise, solver, _latents(), guidance=scales, **noise), atol=1e-5)


def test_an_empty_phase_returns_the_carry():
    solver, x = _solver("UniPCMultistepScheduler"), _latents()
    state, same = run(conditional(_predict, POSITIVE), solver, (solver.init(x), x), begin=3, end=3, guidance=1.0)
    np.testing.assert_array_equal(same, x)
    assert jax.tree.structure(state) == jax.tree.structure(solver.init(x))


def test_a_phase_reports_absolute_progress():
    seen, solver, x = [], _solver(CLASS_NAMES[0]), _latents()
    run(
        conditional(_predict, POSITIVE), solver, (solver.init(x), x), begin=2, end=4, guidance=1.0,
        progress=lambda done, steps: seen.append((done, steps)),
    )  # fmt: skip
    jax.effects_barrier()
    assert sorted(seen) == [(3, STEPS), (4, STEPS)]


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (3, 2), (0, STEPS + 1)])
def test_phase_out_of_range(begin, end):
    solver, x = _solver(CLASS_NAMES[0]), _latents()
    with pytest.raises(ValueError, match="0 <= begin <= end <= 5"):
        run(conditional(_predict, POSITIVE), solver, (solver.init(x), x), begin=begin, end=end, guidance=1.0)


def test_two_expert_scales_switch_below_the_boundary():
    scales, first_low = two_expert_scales(4.0, 3.0, np.array([999, 900, 875, 874, 100]), 875)
    assert scales.tolist() == [4, 4, 4, 3, 3] and scales.dtype == np.float32 and first_low == 3
    assert two_expert_scales(4.0, 3.0, np.array([999.5, 1.5]), 0)[1] == 2
    scales, first_low = two_expert_scales(4.0, 3.0, np.array([800, 1]), 900.0)
    assert scales.tolist() == [3, 3] and first_low == 0


def test_bfloat16_latents_stay_bfloat16():
    result = sample(conditional(_predict, POSITIVE), _solver(CLASS_NAMES[1]), _latents(dtype=jnp.bfloat16),
                    guidance=1.0, key=jax.random.key(0))  # fmt: skip
    assert result.dtype == jnp.bfloat16


def test_errors():
    dpm, denoise = _solver("CogVideoXDPMScheduler"), conditional(_predict, POSITIVE)
    with pytest.raises(UserError, match="give a key, or step_noise of 5 arrays"):
        sample(denoise, dpm, _latents(), guidance=1.0)
    with pytest.raises(UserError, match=r"step_noise: expected shape \(5, 2, 3, 4, 5, 6\)"):
        sample(denoise, dpm, _latents(), guidance=1.0, step_noise=_noise()[1:])
    with pytest.raises(UserError, match=r"one scale or 5 \(one per step\), found shape \(3,\)"):
        sample(denoise, dpm, _latents(), guidance=np.ones(3), key=jax.random.key(0))
