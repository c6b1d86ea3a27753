"""Our jitted denoising loop against diffusers' CogVideoX pipeline on a CPU: eager, and with `torch.compile`.

    python benchmarks/cpu_sample.py [--steps 6 --repeats 5 --frames 5 --height 20 --width 30 --json FILE]

All three run the same weights, latents and embeddings with the same number of threads, float32, guidance in a doubled
batch, from latents to latents. After each has compiled and warmed up, they take turns, so that what else the machine
does hits all alike; ratios are of medians over the turns. The results have to agree, or there is no benchmark.

Needs torch and diffusers beside this package.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

GUIDANCE = 6.0
TEXT_TOKENS = 64
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


def main() -> None:
    """Parses the command line, runs, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    sizes = {
        "steps": 6,
        "repeats": 5,
        "frames": 5,
        "height": 20,
        "width": 30,
        "heads": 8,
        "layers": 8,
        "threads": cores,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    # before jax starts: XLA takes as many threads as it may use cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    report = measure(options)
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(options: argparse.Namespace) -> dict:
    """Builds the three contestants, lets them take turns, checks that they agree; all figures in seconds."""
    import numpy as np
    import torch

    torch.set_num_threads(options.threads)
    inputs = _inputs(options)
    network = _torch_network(options)
    contestants = {
        "diffusers eager": _diffusers_loop(network, inputs, options, compiled=False),
        "diffusers torch.compile": _diffusers_loop(network, inputs, options, compiled=True),
        "sdv_jax": _our_loop(network, inputs, options),
    }
    first, results = {}, {}
    turns, cpu = ({name: [] for name in contestants} for _ in range(2))
    for name, run in contestants.items():
        first[name], _, results[name] = _timed(run)
    for _ in range(options.repeats):
        for name, run in contestants.items():
            seconds, cpu_seconds, _ = _timed(run)
            turns[name].append(seconds)
            cpu[name].append(cpu_seconds)
    reference = results["diffusers eager"]
    errors = {name: float(np.abs(x - reference).max() / np.abs(reference).max()) for name, x in results.items()}
    if max(errors.values()) > 1e-3:
        raise SystemExit(f"the results differ, so there is nothing to compare: {errors}")
    medians = {name: statistics.median(seconds) for name, seconds in turns.items()}
    return {
        "seconds": medians,
        "compile_seconds": {name: max(first[name] - medians[name], 0.0) for name in contestants},
        "ratio_to_eager": medians["diffusers eager"] / medians["sdv_jax"],
        "ratio_to_compile": medians["diffusers torch.compile"] / medians["sdv_jax"],
        "relative_error": errors,
        "turns": turns,
        "cpu_seconds": {name: statistics.median(seconds) for name, seconds in cpu.items()},
        "config": {key: value for key, value in vars(options).items() if key != "json"},
        "tokens": options.frames * (options.height // 2) * (options.width // 2) + TEXT_TOKENS,
        "parameters": sum(p.numel() for p in network.parameters()),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "diffusers")},
        "hardware": {"cpu": _cpu_name(), "threads": options.threads, "platform": platform.platform()},
    }


def table(report: dict) -> str:
    """The report for people."""
    config, hardware = report["config"], report["hardware"]
    lines = [
        f"{hardware['cpu']}, {hardware['threads']} threads; {report['parameters'] / 1e6:.0f} M parameters, "
        f"{report['tokens']} tokens, batch 2 (guidance), {config['steps']} steps, float32",
        f"{'':26}{'loop':>9}{'compiling':>12}{'sdv_jax is':>13}",
    ]
    ours = report["seconds"]["sdv_jax"]
    for name, seconds in report["seconds"].items():
        faster = "" if name == "sdv_jax" else f"{seconds / ours:11.2f} x"
        lines.append(f"{name:26}{seconds:7.2f} s{report['compile_seconds'][name]:10.1f} s{faster}")
    lines.append(f"largest relative difference of the results: {max(report['relative_error'].values()):.1e}")
    return "\n".join(lines)


def _timed(run: Callable) -> tuple[float, float, object]:
    """(seconds on the wall, seconds of all threads together, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


# MARK: contestants


def _inputs(options: argparse.Namespace) -> dict:
    """numpy: latents [1, t, h, w, c], embeddings of prompt and negative prompt [1, s, e]."""
    import numpy as np

    rng = np.random.default_rng(0)
    shapes = {
        "latents": (1, options.frames, options.height, options.width, 16),
        "prompt": (1, TEXT_TOKENS, 256),
        "negative": (1, TEXT_TOKENS, 256),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _torch_network(options: argparse.Namespace):
    import torch
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=options.heads,
        num_layers=options.layers,
        text_embed_dim=256,
        max_text_seq_length=TEXT_TOKENS,
        sample_frames=4 * options.frames - 3,
        sample_height=options.height,
        sample_width=options.width,
        use_rotary_positional_embeddings=True,
    ).eval()


def _diffusers_loop(network, inputs: dict, options: argparse.Namespace, *, compiled: bool) -> Callable:
    """diffusers' own pipeline from latents to latents, the transformer compiled the way its guide says."""
    import torch
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    pipe = CogVideoXPipeline(None, None, None, network, CogVideoXDDIMScheduler(**SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer = torch.compile(network)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}

    def run():
        return pipe(
            prompt_embeds=tensors["prompt"], negative_prompt_embeds=tensors["negative"], guidance_scale=GUIDANCE,
            latents=tensors["latents"].permute(0, 1, 4, 2, 3), num_inference_steps=options.steps, output_type="latent",
            height=8 * options.height, width=8 * options.width, num_frames=4 * options.frames - 3,
        ).frames.permute(0, 1, 3, 4, 2).numpy()  # fmt: skip

    return run


def _our_loop(network, inputs: dict, options: argparse.Namespace) -> Callable:
    """The network's weights through our conversion rules, then the loop as one jitted scan."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from sdv_jax.diffusion import SchedulerConfig, classifier_free, make_solver, sample

    graph, state = nnx.split(_converted(network))
    solver = make_solver(
        SchedulerConfig.from_dict({"_class_name": "CogVideoXDDIMScheduler", **SCHEDULER}), options.steps
    )

    @jax.jit
    def loop(state, latents, prompt, negative):
        def predict(x, timesteps, text):
            return nnx.merge(graph, state)(x, text, timesteps)

        return sample(classifier_free(predict, prompt, negative=negative), solver, latents, guidance=GUIDANCE)

    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    return lambda: np.asarray(loop(state, arrays["latents"], arrays["prompt"], arrays["negative"]))


def _converted(network):
    """Our transformer with the weights of diffusers', by way of a folder and the conversion rules."""
    import jax.numpy as jnp
    from flax import nnx

    from sdv_jax.checkpoints.diffusers_folder import open_component, parse_component, read_json
    from sdv_jax.checkpoints.model_folder import fill
    from sdv_jax.models.cogvideox.family import FAMILY as COGVIDEOX

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network.save_pretrained(folder / "transformer")
        raw = read_json(folder / "transformer" / "config.json")
        source = open_component(folder, COGVIDEOX, "transformer", raw)
        config = parse_component(COGVIDEOX, "transformer", raw, folder)
        graph, state = nnx.split(COGVIDEOX.components["transformer"].abstract(config, dtype=jnp.float32))
        nowhere = {leaf.path: None for leaf in source.leaves}
        return nnx.merge(graph, fill(state, source, dtype=jnp.dtype("float32"), placement=nowhere))


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
