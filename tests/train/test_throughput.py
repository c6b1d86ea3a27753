import time

import jax
import jax.numpy as jnp
import pytest

from sdv_jax.planning import flops
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


@pytest.mark.parametrize("rank", [2, 4])
def test_a_step_costs_each_product_and_one_more_for_each_factor_with_a_gradient(rank):
    """Two layers with a LoRA on each, then a product of activations; against the products of JAX's own gradient."""
    kernels, first = [jnp.ones((4, 6)), jnp.ones((6, 6))], jnp.ones((5, 4))
    pairs = [(jnp.ones((4, rank)), jnp.ones((rank, 6))), (jnp.ones((6, rank)), jnp.ones((rank, 6)))]
    x = jnp.ones((2, 3, 5))

    def forward(pairs, kernels, first, x):
        x = jnp.tanh(x @ first)
        for kernel, (a, b) in zip(kernels, pairs, strict=True):
            x = jnp.tanh(x @ kernel + (x @ a) @ b)
        return jnp.sum(x @ jnp.swapaxes(x, 1, 2))

    rows = 2 * 2 * 3
    before = rows * (5 * 4 + 4 * 6)  # neither factor needs a gradient
    lora = [rows * 4 * rank * 2, rows * rank * 6 * 3, rows * 6 * rank * 3, rows * rank * 6 * 3]
    expected = before + sum(lora) + rows * 6 * 6 * 2 + rows * 3 * 6 * 3
    assert throughput.step_flops(forward, pairs, kernels, first, x) == expected
    assert flops.count(jax.value_and_grad(forward), pairs, kernels, first, x)[0] == expected

    def all_trained(weights, x):
        return forward(*weights, x)

    everything = expected + rows * (5 * 4 + 2 * 4 * 6 + 6 * 6 + 4 * rank)
    assert throughput.step_flops(all_trained, (pairs, kernels, first), x) == everything
    assert flops.count(jax.value_and_grad(all_trained), (pairs, kernels, first), x)[0] == everything


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12),
     ("TPU v6 lite", 918e12), ("cpu", None), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A10", 125e12), ("NVIDIA A10G", 70e12), ("NVIDIA A1000", None),
     ("NVIDIA A100X", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("TPU v4 lite", 138e12),
     ("NVIDIA RTX 4000 Ada Generation", None), ("TPU v5", 459e12), ("TPU v5e", 197e12), ("TPU v3", 61.5e12)],
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
