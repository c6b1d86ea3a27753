"""The whole way: a diffusers pipeline to our folder and back, bit for bit, and what is refused on the way."""

import json
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from sdv_jax.checkpoints import staging
from sdv_jax.checkpoints.convert import convert, export
from sdv_jax.checkpoints.model_folder import check_sums, read_config
from sdv_jax.checkpoints.safetensors_io import Output, open_folder, rows_of, write_folder
from sdv_jax.errors import UserError

PARTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
KINDS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def tensors(folder) -> dict[str, dict[str, np.ndarray]]:
    return {part: {name: tensor.read() for name, tensor in open_folder(folder / part).items()} for part in PARTS}


def rewrite(folder, part: str, found: dict[str, np.ndarray], *, variant: str = "", shard_bytes: int = 10**9) -> None:
    for file in (folder / part).glob("*.safetensors*"):
        file.unlink()
    outputs = [Output(name, array.dtype, array.shape, rows_of(array)) for name, array in found.items()]
    write_folder(folder / part, PARTS[part] + variant, outputs, shard_bytes=shard_bytes)


def assert_equal_bits(ours, theirs) -> None:
    assert {p: found.keys() for p, found in ours.items()} == {p: found.keys() for p, found in theirs.items()}
    for part, found in theirs.items():
        for name, array in found.items():
            mine = ours[part][name]
            assert (mine.dtype, mine.shape, mine.tobytes()) == (array.dtype, array.shape, array.tobytes()), (part, name)


@pytest.fixture
def source(tiny_pipeline_folder, tmp_path):
    """A copy of the small pipeline, free to be spoiled."""
    return shutil.copytree(tiny_pipeline_folder(True), tmp_path / "source")


def cast_source(source, kind: str, **options) -> None:
    for part, found in tensors(source).items():
        rewrite(source, part, {name: array.astype(KINDS[kind]) for name, array in found.items()}, **options)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize(
    "rope, kind, options",
    [
        (True, "float32", {}),
        (False, "float32", {"shard_bytes": 20_000}),
        (True, "bfloat16", {}),
        (True, "float16", {"variant": ".fp16"}),
    ],
)
def test_round_trip_is_bit_equal(tiny_pipeline_folder, tmp_path, rope, kind, options):
    source = shutil.copytree(tiny_pipeline_folder(rope), tmp_path / "source")
    cast_source(source, kind, **options)
    before = tensors(source)
    convert(source, tmp_path / "model", progress=False)
    export(tmp_path / "model", tmp_path / "back", progress=False)
    assert_equal_bits(tensors(tmp_path / "back"), before)
    assert read_config(tmp_path / "model")["dtype"] == dict.fromkeys(PARTS, kind)
    for file in ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)):
        assert json.loads((tmp_path / "back" / file).read_text()) == json.loads((source / file).read_text())
    for file in (source / "tokenizer").iterdir():
        assert (tmp_path / "back" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    check_sums(tmp_path / "model")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back", "model", "source"]


def test_diffusers_loads_the_sharded_export(source, tmp_path):
    import torch
    from diffusers import CogVideoXPipeline

    convert(source, tmp_path / "model", progress=False)
    export(tmp_path / "model", tmp_path / "back", shard_bytes=20_000, progress=False)
    assert len(list((tmp_path / "back" / "text_encoder").glob("*.safetensors"))) > 1
    ours, theirs = (CogVideoXPipeline.from_pretrained(folder) for folder in (tmp_path / "back", source))
    for part in PARTS:
        mine, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in other)
    assert ours.tokenizer("a red ball").input_ids == theirs.tokenizer("a red ball").input_ids
    assert ours.scheduler.config == theirs.scheduler.config


def test_dtype_is_rounded_as_numpy_does(source, tmp_path):
    convert(source, tmp_path / "model", dtype="bfloat16", progress=False)
    export(tmp_path / "model", tmp_path / "back", progress=False)
    assert_equal_bits(
        tensors(tmp_path / "back"),
        {
            part: {name: array.astype(KINDS["bfloat16"]) for name, array in found.items()}
            for part, found in tensors(source).items()
        },
    )
    assert json.loads((tmp_path / "back" / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"


def test_layers_of_different_dtypes_and_tied_tensors_survive(source, tmp_path):
    found = tensors(source)
    for number, (name, array) in enumerate(sorted(found["transformer"].items())):
        found["transformer"][name] = array.astype(list(KINDS.values())[number % 3])
    found["text_encoder"]["encoder.embed_tokens.weight"] = found["text_encoder"]["shared.weight"]
    for part in ("transformer", "text_encoder"):
        rewrite(source, part, found[part])
    convert(source, tmp_path / "model", progress=False)
    export(tmp_path / "model", tmp_path / "back", progress=False)
    assert_equal_bits(tensors(tmp_path / "back"), found)


def test_the_tied_tensor_may_come_under_its_other_name(source, tmp_path):
    found = tensors(source)["text_encoder"]
    found["encoder.embed_tokens.weight"] = found.pop("shared.weight")
    rewrite(source, "text_encoder", found)
    before = tensors(source)
    convert(source, tmp_path / "model", progress=False)
    export(tmp_path / "model", tmp_path / "back", progress=False)
    assert_equal_bits(tensors(tmp_path / "back"), before)


def test_large_leaves_are_cut_into_blocks(source, tmp_path, monkeypatch):
    monkeypatch.setattr("sdv_jax.checkpoints.engine.BLOCK_BYTES", 3000)
    before = tensors(source)
    convert(source, tmp_path / "model", progress=False)
    blocks = list((tmp_path / "model" / "transformer" / "blocks.ff.up.kernel" / "c").rglob("*"))
    assert len([block for block in blocks if block.is_file()]) > 2
    check_sums(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back", progress=False)
    assert_equal_bits(tensors(tmp_path / "back"), before)


# ---------------------------------------------------------------- refusals


def refused(source, tmp_path, *parts: str, **options) -> None:
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "model", progress=False, **options)
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in parts), line
    assert not [entry.name for entry in tmp_path.iterdir() if "model" in entry.name]


def edit(file, **changes) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def spoil(part: str, change):
    def apply(source):
        found = tensors(source)[part]
        change(found)
        rewrite(source, part, found)

    return apply


def put(name: str, value):
    def change(found):
        found[name] = found[name].copy()
        found[name].reshape(-1)[-1] = value

    return change


QKV = "transformer_blocks.1.attn1.to_k.weight"
REFUSALS = {
    "missing tensor": (spoil("transformer", lambda t: t.pop(QKV)), f"missing {QKV} (32, 32)"),
    "extra tensor": (spoil("vae", lambda t: t.update(surplus=np.zeros(3, np.float32))), "unexpected surplus (3,)"),
    "wrong shape": (
        spoil("transformer", lambda t: t.update({QKV: t[QKV][:, :5]})),
        f"{QKV} has shape (32, 5), expected (32, 32)",
    ),
    "nan": (
        spoil("vae", put("decoder.conv_in.conv.weight", np.nan)),
        "decoder.conv_in.conv.weight holds NaN or infinite",
    ),
    "infinity": (spoil("text_encoder", put("shared.weight", -np.inf)), "shared.weight holds NaN or infinite"),
    "tied but different": (
        spoil("text_encoder", lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1})),
        "one tied tensor",
    ),
    "truncated": (
        lambda s: (f := s / "vae/diffusion_pytorch_model.safetensors").write_bytes(f.read_bytes()[:-10]),
        "truncated",
    ),
    "no model_index.json": (lambda s: (s / "model_index.json").unlink(), "no model_index.json"),
    "broken model_index.json": (lambda s: (s / "model_index.json").write_text("{"), "not readable as JSON"),
    "unknown pipeline": (
        lambda s: edit(s / "model_index.json", _class_name="FluxPipeline"),
        "unknown pipeline class 'FluxPipeline'",
    ),
    "unknown class in the index": (
        lambda s: edit(s / "model_index.json", vae=["diffusers", "AutoencoderKLWan"]),
        "vae has unknown class AutoencoderKLWan",
    ),
    "unknown class in a config": (
        lambda s: edit(s / "vae/config.json", _class_name="AutoencoderKLWan"),
        "unknown class 'AutoencoderKLWan'",
    ),
    "unknown component": (lambda s: edit(s / "model_index.json", safety=["x", "Checker"]), "unknown component safety"),
    "component not in the index": (lambda s: edit(s / "model_index.json", vae=...), "no vae"),
    "missing component folder": (lambda s: shutil.rmtree(s / "vae"), "vae/config.json: no such file"),
    "missing weights": (lambda s: (s / "vae/diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    "unknown config key": (
        lambda s: edit(s / "transformer/config.json", use_magic=True),
        "unknown config key use_magic",
    ),
    "config of another size": (
        lambda s: edit(s / "transformer/config.json", num_layers=3),
        "missing transformer_blocks.2.",
    ),
    "senseless config value": (lambda s: edit(s / "vae/config.json", block_out_channels="wide"), "vae/config.json"),
    "more layers than any model": (
        lambda s: edit(s / "transformer/config.json", num_layers=1_000_000),
        "transformer/config.json: transformer config: num_layers = 1000000; expected a whole number <= 10000",
    ),
    "wider than any file": (
        lambda s: (
            edit(s / "text_encoder/config.json", d_ff=2**24, d_model=2**24, num_layers=10_000),
            edit(s / "transformer/config.json", text_embed_dim=2**24),
        ),
        "text_encoder: the config asks for blocks.ff.wi_0.kernel of shape (10000, 16777216, 16777216)",
    ),
    "unknown scheduler": (
        lambda s: edit(s / "scheduler/scheduler_config.json", _class_name="PNDM"),
        "unknown class 'PNDM'",
    ),
    "no scheduler": (lambda s: shutil.rmtree(s / "scheduler"), "scheduler_config.json: no such file"),
    "no tokenizer": (lambda s: shutil.rmtree(s / "tokenizer"), "no tokenizer_config.json"),
    "tokenizer without vocabulary": (
        lambda s: (s / "tokenizer/tokenizer.json").unlink(),
        "tokenizer: no vocabulary, neither spiece.model nor tokenizer.json",
    ),
    "damaged vocabulary": (
        lambda s: (s / "tokenizer/spiece.model").write_bytes(b"\x0a\x50"),
        "tokenizer/spiece.model: damaged (",
    ),
    "json without end": (lambda s: (s / "vae/config.json").write_text('{"a":' * 100_000), "brackets nest too deep"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(source, tmp_path, case):
    change, message = REFUSALS[case]
    change(source)
    refused(source, tmp_path, message)


def test_mistakes_of_all_components_come_together(source, tmp_path):
    spoil("transformer", lambda t: t.pop(QKV))(source)
    spoil("vae", lambda t: t.pop("decoder.conv_in.conv.bias"))(source)
    refused(source, tmp_path, f"missing {QKV}", "missing decoder.conv_in.conv.bias", " | ")


def test_not_enough_disk(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(source, tmp_path, "not enough disk", "0.0 GB free")


def test_full_disk_while_writing(source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdv_jax.checkpoints.convert.shutil.copytree", full)
    refused(source, tmp_path, "No space left on device")


def test_unknown_dtype(source, tmp_path):
    refused(source, tmp_path, "unknown value 'int8'", dtype="int8")


@pytest.mark.parametrize(
    "name, message", [("nowhere", "not a folder"), ("file", "not a folder"), ("no/such", "cannot be downloaded")]
)
def test_source_that_is_no_folder(tmp_path, monkeypatch, name, message):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("offline\nmore"))
    )
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" if name == "file" else name, tmp_path, message)


def test_destination_that_exists(source, tmp_path):
    (tmp_path / "model").mkdir()
    for function in (convert, export):
        if function is export:
            convert(source, tmp_path / "other", progress=False)
            source = tmp_path / "other"
        with pytest.raises(UserError, match="exists already"):
            function(source, tmp_path / "model", progress=False)
    assert not list((tmp_path / "model").iterdir())


def test_two_writers(source, tmp_path):
    with staging.staged(tmp_path / "model", needed=0), pytest.raises(UserError, match="another process is writing"):
        convert(source, tmp_path / "model", progress=False)
    assert (tmp_path / "model").is_dir()


def test_export_of_something_else(source, tmp_path):
    with pytest.raises(UserError, match="a diffusers pipeline folder already"):
        export(source, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="neither model.json"):
        export(tmp_path, tmp_path / "out", progress=False)


# ---------------------------------------------------------------- kill, memory


def enlarge(source, *, vocab: int, layers: int, ff: int, kind: str) -> int:
    """Gives `source` a text encoder of this size and returns the bytes of its largest tensor."""
    width, projection = 512, "patch_embed.text_proj.weight"
    transformer = tensors(source)["transformer"]
    transformer[projection] = np.resize(transformer[projection], (len(transformer[projection]), width))
    rewrite(source, "transformer", transformer)
    edit(source / "transformer/config.json", text_embed_dim=width)
    edit(
        source / "text_encoder/config.json",
        vocab_size=vocab,
        d_model=width,
        d_kv=8,
        num_heads=8,
        d_ff=ff,
        num_layers=layers,
    )
    shapes = {
        "shared.weight": (vocab, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
    }
    for i in range(layers):
        at = f"encoder.block.{i}.layer"
        shapes |= {
            f"{at}.0.layer_norm.weight": (width,),
            f"{at}.1.layer_norm.weight": (width,),
            f"{at}.0.SelfAttention.o.weight": (width, 64),
            f"{at}.1.DenseReluDense.wo.weight": (width, ff),
        }
        shapes |= {f"{at}.0.SelfAttention.{name}.weight": (64, width) for name in "qkv"}
        shapes |= {f"{at}.1.DenseReluDense.{name}.weight": (ff, width) for name in ("wi_0", "wi_1")}
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(KINDS[kind])
    for file in (source / "text_encoder").glob("*.safetensors"):
        file.unlink()
    outputs = [Output(name, noise.dtype, shape, _Noise(noise, shape)) for name, shape in shapes.items()]
    write_folder(source / "text_encoder", "model", outputs)
    return max(output.nbytes for output in outputs)


class _Noise:
    def __init__(self, noise, shape):
        self.noise, self.shape = noise, shape

    def __iter__(self):
        yield np.resize(self.noise, self.shape)


def test_killed_conversion_leaves_nothing_that_looks_complete(source, tmp_path):
    enlarge(source, vocab=32000, layers=4, ff=2048, kind="float32")
    code = "import sys; from sdv_jax.checkpoints.convert import convert; convert(*sys.argv[1:], progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(tmp_path / "model")])
    partial = tmp_path / ".model.partial"
    while process.poll() is None and not list(partial.glob("text_encoder*/*.kernel")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the conversion was over before it could be killed"
    assert partial.is_dir() and not (tmp_path / "model").exists()
    with pytest.raises(UserError, match="neither model.json"):
        read_config(partial)
    convert(source, tmp_path / "model", progress=False)
    assert not partial.exists()
    check_sums(tmp_path / "model")


MEASURE = """
import sys
from sdv_jax.checkpoints import arrays, convert as c, engine, safetensors_io
for module in (arrays, engine, safetensors_io):
    module.BLOCK_BYTES = 4 * 2**20  # an eighth, as are the tensors of those it is made for
def peak():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
small, large, out = sys.argv[1:]
c.convert(small, out + "/small", progress=False)
c.export(out + "/small", out + "/small back", progress=False)
before = peak()  # with all that a conversion imports
c.convert(large, out + "/large", progress=False)
c.export(out + "/large", out + "/large back", progress=False)
print(peak() - before, before)
"""


@pytest.mark.parametrize(
    "size",
    [
        # One tensor of 123 MB, but an embedding, which is read by rows.
        {"vocab": 60_000, "layers": 1, "ff": 64, "kind": "float32"},
        # Three stacks of 126 MB, tensors of 4 MB.
        {"vocab": 64, "layers": 30, "ff": 4096, "kind": "bfloat16"},
    ],
)
def test_memory_does_not_grow_with_the_model(source, tmp_path, size):
    small = shutil.copytree(source, tmp_path / "tiny")
    largest = enlarge(source, **size)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, small, source, tmp_path], check=True, capture_output=True, text=True
    )
    growth, before = map(int, run.stdout.split())
    megabytes = [round(count / 1e6) for count in (largest, growth, before)]
    print("largest tensor {} MB, growth {} MB over {} MB".format(*megabytes))
    assert growth <= 80e6  # half is blocks on their way, half the heap's own
