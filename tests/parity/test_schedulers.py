"""Our schedules and solvers against the schedulers of diffusers, which run the loop of its CogVideoX pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.diffusion import Schedule, SchedulerConfig, classifier_free, dynamic_scale, make_solver, sample
from sdv_jax.diffusion.schedules import CLASS_NAMES
from tests.parity.compare import assert_close

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

SHAPE = (2, 3, 4, 6, 4)  # b t h w c
PUBLISHED = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
CONFIGS = {
    "2b": {**PUBLISHED, "snr_shift_scale": 3.0},
    "5b": {**PUBLISHED, "snr_shift_scale": 1.0},
    "class defaults": {},
    "leading": {**PUBLISHED, "timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {**PUBLISHED, "timestep_spacing": "linspace"},
    "last alpha kept": {**PUBLISHED, "timestep_spacing": "leading", "set_alpha_to_one": False},
    "sample": {**PUBLISHED, "prediction_type": "sample"},
    "epsilon": {**PUBLISHED, "prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "linear": {**PUBLISHED, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "squared cosine": {**PUBLISHED, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "trained betas": {**PUBLISHED, "trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
    "clip is ignored": {**PUBLISHED, "clip_sample": True, "clip_sample_range": 0.1},
    "short training": {**PUBLISHED, "num_train_timesteps": 100},
}


def _both(class_name: str, settings: dict):
    return SchedulerConfig.from_dict({"_class_name": class_name, **settings}), getattr(diffusers, class_name)(
        **settings
    )


def _level(ours: Schedule, theirs) -> None:
    """Compares abar, and gives diffusers ours where it computes in float32: the last digit of torch's square root
    depends on the processor there (MKL), and in sqrt(1 - abar) near abar = 1 it weighs a hundred times as much.
    """
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), 1e-6)
    if theirs.alphas_cumprod.dtype == torch.float32:
        theirs.alphas_cumprod = torch.tensor(ours.alphas_cumprod)


def _draws(theirs, steps: int, seed: int) -> np.ndarray:
    """The noise array each step of diffusers' loop ends up using, from the order in which it draws."""
    generator = torch.Generator().manual_seed(seed)
    used = []
    for i, t in enumerate(theirs.timesteps.tolist()):
        second_order = i > 0 and t - theirs.config.num_train_timesteps // steps >= 0
        for _ in range(2 if second_order else 1):
            noise = torch.randn(SHAPE, generator=generator)
        used.append(noise.numpy())
    return np.stack(used)


def _their_loop(theirs, predict, latents, *, seed: int = 0, dtype=torch.float32) -> list[np.ndarray]:
    """The loop of CogVideoXPipeline.__call__ around `predict(latents, i)`; all latents after each step."""
    generator = torch.Generator().manual_seed(seed)
    latents, old, visited = torch.tensor(np.asarray(latents)).to(dtype), None, []
    for i, t in enumerate(theirs.timesteps):
        prediction = predict(latents, i).float()
        if isinstance(theirs, diffusers.CogVideoXDPMScheduler):
            back = theirs.timesteps[i - 1] if i > 0 else None
            latents, old = theirs.step(prediction, old, t, back, latents, generator=generator, return_dict=False)
        else:
            latents = theirs.step(prediction, t, latents, return_dict=False)[0]
        latents = latents.to(dtype)
        visited.append(latents.float().numpy())
    return visited


@pytest.mark.parametrize("name", CONFIGS)
def test_schedule(name):
    config, theirs = _both("CogVideoXDDIMScheduler", CONFIGS[name])
    ours = Schedule(config)
    assert ours.alphas_cumprod.dtype == theirs.alphas_cumprod.numpy().dtype
    _level(ours, theirs)
    x0, noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    for pair in ([0, config.num_train_timesteps - 1], [37, 50]):
        t = np.asarray(pair)
        args = torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
        assert_close(ours.add_noise(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(t)), theirs.add_noise(*args), 1e-6)
        assert_close(
            ours.velocity(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(t)), theirs.get_velocity(*args), 1e-6
        )


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_for_every_count(spacing):
    """Every number of steps; `trailing` of diffusers goes one too far for some, which is cut off (see Schedule)."""
    config, theirs = _both("CogVideoXDDIMScheduler", {**PUBLISHED, "timestep_spacing": spacing})
    overshot = []
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.numpy()
        if len(expected) != steps:
            overshot.append(steps)
            assert len(expected) == steps + 1 and expected[-1] == -1
        np.testing.assert_array_equal(Schedule(config).timesteps(steps), expected[:steps])
    assert (len(overshot) == 62 and overshot[0] == 61) if spacing == "trailing" else not overshot


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_trajectory(class_name, name, steps):
    """Random predictions in place of a network: every step of the trajectory."""
    config, theirs = _both(class_name, CONFIGS[name])
    _level(Schedule(config), theirs)
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(steps)
    predictions = rng.standard_normal((steps, *SHAPE)).astype(np.float32)
    latents = rng.standard_normal(SHAPE).astype(np.float32)
    expected = _their_loop(theirs, lambda x, i: torch.tensor(predictions[i]), latents)
    noise = _draws(theirs, steps, seed=0)
    solver = make_solver(config, steps)
    step = jax.jit(solver.step)
    x = jnp.asarray(latents)
    state = solver.init(x)
    for i in range(steps):
        state, x = step(state, jnp.asarray(predictions[i]), x, i, jnp.asarray(noise[i]))
        assert_close(x, expected[i], 1e-5)


def _network(module, transpose_weights: np.ndarray):
    """A small nonlinear network of x and t, in numpy-like calls both libraries have."""
    return lambda x, t: module.tanh(x @ transpose_weights + 0.001 * t) - 0.3 * x


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["2b", "5b"])
@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_whole_loop_with_feedback(class_name, name, dynamic, steps):
    """`sample` as one scan, the network fed with its own results and guidance as diffusers computes it."""
    config, theirs = _both(class_name, CONFIGS[name])
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((4, 4)).astype(np.float32)
    latents = rng.standard_normal(SHAPE).astype(np.float32)
    scale, noise = 6.0, _draws(theirs, steps, seed=3)

    def their_prediction(x, i):
        t = theirs.timesteps[i]
        network = _network(torch, torch.tensor(weights))
        without, with_text = network(x, t) + 0.1, network(x, t) + 0.2 * x
        used = scale
        if dynamic:
            used = 1 + scale * ((1 - np.cos(np.pi * ((steps - t.item()) / steps) ** 5.0)) / 2)
        return without + used * (with_text - without)

    def predict(x, t, condition):
        network = _network(jnp, weights)
        return network(x, t[:, None, None, None, None]) + condition["add"] + condition["mul"] * x

    conditions = {"add": jnp.zeros((2, 1, 1, 1, 1)), "mul": jnp.full((2, 1, 1, 1, 1), 0.2)}
    negative = {"add": jnp.full((2, 1, 1, 1, 1), 0.1), "mul": jnp.zeros((2, 1, 1, 1, 1))}
    solver = make_solver(config, steps)
    guidance = dynamic_scale(scale, solver.timesteps) if dynamic else scale
    run = jax.jit(
        lambda x, n: sample(
            classifier_free(predict, conditions, negative=negative), solver, x, guidance=guidance, step_noise=n
        )
    )
    expected = _their_loop(theirs, their_prediction, latents, seed=3)[-1]
    assert_close(run(jnp.asarray(latents), jnp.asarray(noise)), expected, 1e-3)


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_bfloat16_latents(class_name, monkeypatch):
    """Rounded to bfloat16 after every step, as the pipeline does: within twice diffusers' own error."""
    steps = 20
    config, theirs = _both(class_name, CONFIGS["5b"])
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((4, 4)).astype(np.float32)
    latents = np.asarray(jnp.asarray(rng.standard_normal(SHAPE), jnp.bfloat16).astype(jnp.float32))
    noise = _draws(theirs, steps, seed=0)

    def in_float32(shape, *, generator, device, dtype):  # bfloat16 draws are other numbers than float32 draws
        return torch.randn(shape, generator=generator).to(dtype)

    monkeypatch.setattr("diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", in_float32)

    def their_prediction(x, i):
        return _network(torch, torch.tensor(weights))(x.float(), theirs.timesteps[i])

    def denoise(x, t, scale):
        return _network(jnp, weights)(x.astype(jnp.float32), t[:, None, None, None, None])

    exact = _their_loop(theirs, their_prediction, latents)[-1]
    rounded = _their_loop(theirs, their_prediction, latents, dtype=torch.bfloat16)[-1]
    start, solver = jnp.asarray(latents, jnp.bfloat16), make_solver(config, steps)
    ours = sample(denoise, solver, start, guidance=1.0, step_noise=jnp.asarray(noise))
    assert ours.dtype == jnp.bfloat16
    error, their_error = (float(np.abs(np.asarray(x, np.float32) - exact).max()) for x in (ours, rounded))
    assert 0 < error <= 2 * their_error
