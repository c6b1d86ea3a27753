"""The tables of names against the published lists of tensors, in both directions."""

import pytest

from sdv_jax.models.wan import original_names
from sdv_jax.models.wan.original_names import Names, diffusers_name, original_name
from tests import published

TIED = "encoder.embed_tokens.weight"  # UMT5's second name of shared.weight, one tensor in the files
CASES = {
    ("Wan2.1-T2V-1.3B.transformer", "Wan2.1-T2V-1.3B-Diffusers", "transformer"): original_names.TRANSFORMER,
    ("Wan2.x-T2V-14B.transformer", "Wan2.1-T2V-14B-Diffusers", "transformer"): original_names.TRANSFORMER,
    ("Wan2.x-T2V-14B.transformer", "Wan2.2-T2V-A14B-Diffusers", "transformer_2"): original_names.TRANSFORMER,
    ("Wan2.2-TI2V-5B.transformer", "Wan2.2-TI2V-5B-Diffusers", "transformer"): original_names.TRANSFORMER,
    ("Wan2.1_VAE.pth", "Wan2.1-T2V-14B-Diffusers", "vae"): original_names.vae21(),
    ("Wan2.2_VAE.pth", "Wan2.2-TI2V-5B-Diffusers", "vae"): original_names.vae22(),
    ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.2-TI2V-5B-Diffusers", "text_encoder"): original_names.UMT5,
}


def one_to_one(table: Names, ours: list[str], theirs: list[str]) -> None:
    """Every name of either list has exactly one row, and that leads to the other list and back."""
    for name in ours:
        assert len([row for row in table.rows if row.path(name)]) == 1, name
        assert table.original(table.diffusers(name)) == name
    for name in theirs:
        assert len([row for row in table.rows if row.torch_name(name)]) == 1, name
        assert table.diffusers(table.original(name)) == name
    assert sorted(map(table.diffusers, ours)) == sorted(theirs)


@pytest.mark.parametrize("files, table", CASES.items(), ids=[" ".join(files) for files in CASES])
def test_published_tensors_map_one_to_one(files, table):
    name, checkpoint, component = files
    ours, theirs = published.original(name), published.tensors(checkpoint, component)
    theirs.pop(TIED, None)
    assert {table.diffusers(tensor): shape for tensor, shape in ours.items()} == theirs
    one_to_one(table, list(ours), list(theirs))


@pytest.mark.parametrize("files, table", CASES.items(), ids=[" ".join(files) for files in CASES])
def test_modules_map_as_their_tensors_do(files, table):
    name, checkpoint, component = files

    def modules(tensors):
        return sorted({tensor.rpartition(".")[0] for tensor in tensors if not tensor.endswith(("table", "modulation"))})

    theirs = published.tensors(checkpoint, component)
    theirs.pop(TIED, None)
    one_to_one(table, modules(published.original(name)), modules(theirs))


def test_a_few_by_hand():
    assert diffusers_name("blocks.3.self_attn.q.weight") == "blocks.3.attn1.to_q.weight"
    assert diffusers_name("blocks.3.self_attn.q") == "blocks.3.attn1.to_q"
    assert diffusers_name("head.modulation") == "scale_shift_table"
    assert diffusers_name("blocks.12.modulation") == "blocks.12.scale_shift_table"
    assert diffusers_name("blocks.0.norm3.bias") == "blocks.0.norm2.bias"
    assert original_name("blocks.29.ffn.net.0.proj") == "blocks.29.ffn.0"
    for nothing in ("blocks.0.norm1.weight", "blocks.0.cross_attn.k_img.weight", "img_emb.proj.1.weight", "nothing"):
        assert diffusers_name(nothing) is None
    for nothing in ("blocks.0.norm3.weight", "blocks.0.self_attn.q", "blocks.0.attn1.to_q.lora_A.weight"):
        assert original_name(nothing) is None


@pytest.mark.parametrize("count", [1, 3])
def test_autoencoders_of_other_depths(count):
    flat, staged = original_names.vae21(count), original_names.vae22(count)
    for stage in range(3):
        last = stage * (count + 2) + count + 1
        assert flat.diffusers(f"decoder.upsamples.{last}.time_conv.bias") == (
            f"decoder.up_blocks.{stage}.upsamplers.0.time_conv.bias"
        )
        assert flat.diffusers(f"decoder.upsamples.{last - 1}.residual.6") == (
            f"decoder.up_blocks.{stage}.resnets.{count}.conv2"
        )
    assert staged.diffusers(f"encoder.downsamples.1.downsamples.{count}.resample.1.weight") == (
        "encoder.down_blocks.1.downsampler.resample.1.weight"
    )
    assert staged.original("decoder.up_blocks.1.upsampler.time_conv") == (
        f"decoder.upsamples.1.upsamples.{count + 1}.time_conv"
    )
