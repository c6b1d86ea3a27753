import time

import jax
import jax.numpy as jnp
import pytest

from sdv_jax.train import plan, throughput
from sdv_jax.train.throughput import Cost, Meter
from tests.train import tiny


def test_rates_are_those_of_the_formula():
    meter = Meter(began=time.time() - 10, counted=4.0, peak=2e12)
    found = meter.read(Cost(samples=8, tokens=400, flops=6e12), seconds=2.0, waited=0.5, counts=True)
    assert found["samples_per_second"] == 4 and found["tokens_per_second"] == 200
    devices = jax.device_count()
    assert found["tflops_per_device"] == pytest.approx(3 / devices)
    assert found["mfu"] == pytest.approx(1.5 / devices)
    assert found["data_wait"] == 0.25
    assert found["goodput"] == pytest.approx(0.55, abs=0.01)  # 4 s before and 1.5 s now, of 10
    assert found["peak_memory"] > 1e7
    assert "mfu" not in Meter(began=0.0, counted=0.0, peak=None).read(Cost(1, 1, 1.0), 1.0, 0.0, counts=True)


def test_a_step_that_was_compiled_for_does_not_count():
    meter = Meter(began=time.time() - 10, counted=4.0, peak=None)
    assert meter.read(Cost(1, 1, 1.0), 3.0, 0.0, counts=False)["goodput"] == pytest.approx(0.4, abs=0.01)


def test_frozen_weights_cost_two_passes_and_trained_ones_three():
    def forward(w, x):
        return jnp.sum((x @ w) @ jnp.swapaxes(x @ w, 1, 2))

    w, x = jnp.ones((4, 6)), jnp.ones((2, 3, 4))
    weights, activations = 2 * (2 * 6 * 4 * 6), 2 * 2 * 3 * 3 * 6
    assert throughput.step_flops(forward, w, x, adapter_only=True) == 2 * weights + 3 * activations
    assert throughput.step_flops(forward, w, x, adapter_only=False) == 3 * weights + 3 * activations


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12),
     ("TPU v6 lite", 918e12), ("cpu", None)],
)  # fmt: skip
def test_peaks_are_known_by_the_device(monkeypatch, kind, expected):
    device = type("Device", (), {"device_kind": kind})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert throughput.peak_flops(0.0) == expected
    assert throughput.peak_flops(5e12) == 5e12


def test_tokens_of_a_step_include_its_references():
    geometry = tiny_geometry()
    shapes = {"motion": (2, 4, 2, 4, 4, 4)}  # parts, rows, t, h, w, c
    config = tiny.config(motion__token_drop=0.5)
    assert plan.tokens(config, "motion", shapes, geometry) == 8 * (2 * 4 + 2)
    assert plan.tokens(tiny.config(motion__references=0), "motion", shapes, geometry) == 8 * 2 * 4
    one = {"identity": (1, 4, 1, 4, 4, 4)}
    assert plan.tokens(config, "identity", one, geometry) == 4 * 8
    assert plan.tokens(config, "identity/no_reference", one, geometry) == 4 * 4


def tiny_geometry():
    from sdv_jax.train import setup

    return setup.about(tiny.config()).traits.geometry
