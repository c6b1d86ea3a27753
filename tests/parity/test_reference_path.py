"""The reference path against PyTorch written here from paper A: diffusers' modules called one by one, nothing of ours.

What the paper and its code say of CogVideoX: the reference's latent goes through the video's patch embedding; the
sequence is [text | reference | video] with full attention; the rotary table is made for the clip and the reference
together, the reference first, text has none; in every adaLN the reference takes the video's (shift, scale, gate); it
shares the timestep; it is dropped before the final norm. LoRA sits where PEFT's suffix matching puts it, either on
every stream or, for the linears of the adaLNs, on the reference alone.

What it does not say, since it knows neither image-to-video nor CogVideoX 1.5, is our choice: image channels of a
reference are zero, a patch over several frames holds the reference in each of them, and learned positions give it those
of the clip's first frame.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from peft import LoraConfig, inject_adapter_in_model
from safetensors.numpy import save_file

from sdv_jax.checkpoints import adapter_files
from tests.parity.compare import assert_close, relative_error
from tests.parity.weights import inputs, rotary, run_ours, run_theirs, transformer_pair

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2")
RANK, ALPHA = 5, 3.0
FRAMES, HEIGHT, WIDTH = 3, 6, 10  # neither the trained grid nor its aspect ratio
TOKENS = (HEIGHT // 2) * (WIDTH // 2)
ROPE = {"use_rotary_positional_embeddings": True}
CONFIGS = {
    "rotary": ROPE,
    "sin-cos": {},
    "5b-I2V": ROPE
    | {"in_channels": 8, "use_learned_positional_embeddings": True, "sample_height": HEIGHT, "sample_width": WIDTH},
    "1.5-I2V": ROPE | {"in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 24},
}


# MARK: the independent computation


class Peer:
    """diffusers' weights with explicit low-rank matrices: module name -> (A, B), as PEFT stores them."""

    def __init__(self, model, adapter, mode):
        self.model, self.adapter, self.mode = model, adapter, mode

    def apply(self, name, x, *, reference_stream=False):
        """Module `name` on x, with its low-rank update where the mode wants it."""
        module = self.model.get_submodule(name)
        y = module(x)
        if name not in self.adapter or (self.mode == "reference" and ".norm" in name and not reference_stream):
            return y
        a, b = self.adapter[name]
        if isinstance(module, torch.nn.Conv2d):
            low = F.conv2d(F.conv2d(x, a, stride=module.stride), b)
        else:
            low = x @ a.T @ b.T
        return y + ALPHA / RANK * low

    @torch.no_grad()
    def __call__(self, latents, text, timesteps, reference=None, index=None, *, image=None):
        """[b, t, h, w, c] from numpy inputs; `index` [b, r] are the reference tokens that stay."""
        latents, text = torch.from_numpy(latents), torch.from_numpy(text)
        c, (frames, height, width) = self.model.config, latents.shape[1:4]
        span = c.patch_size_t or 1
        video = self.patches(self.with_image(latents, image))
        pictures, count = video[:, :0], 0
        if reference is not None:
            count = reference.shape[1]
            shown = torch.from_numpy(reference).repeat_interleave(span, dim=1)
            pictures = self.patches(self.with_image(shown, None))
        words = self.apply("patch_embed.text_proj", text)
        cut = count * TOKENS
        table = rotary(self.model, frames + count * span, height, width)
        if table is None:
            positions = self.absolute(frames + count, height, width)
            pictures, video = pictures + positions[:cut], video + positions[cut:]
        if c.use_learned_positional_embeddings:
            told = self.model.patch_embed.pos_embedding[0].float()  # until loaded, diffusers has it as float64
            words, video = words + told[: text.shape[1]], video + told[text.shape[1] :]
            first = told[text.shape[1] : text.shape[1] + TOKENS]
            pictures = (pictures.unflatten(1, (count, TOKENS)) + first).flatten(1, 2) if count else pictures
        picture_table = None if table is None else [part[:cut].expand(len(latents), -1, -1) for part in table]
        if index is not None:
            rows = torch.from_numpy(index)
            pictures = torch.stack([one[row] for one, row in zip(pictures, rows, strict=True)])
            if table is not None:
                kept = [[one[row] for one, row in zip(part, rows, strict=True)] for part in picture_table]
                picture_table = [torch.stack(part) for part in kept]
        joined = None
        if table is not None:
            video_table = [part[cut:].expand(len(latents), -1, -1) for part in table]
            joined = [torch.cat(parts, dim=1) for parts in zip(picture_table, video_table, strict=True)]
        time = self.model.time_embedding(self.model.time_proj(torch.as_tensor(timesteps)))
        if c.ofs_embed_dim is not None:
            time = time + self.model.ofs_embedding(self.model.ofs_proj(torch.tensor([2.0])))
        streams = [words, pictures, video]
        for i in range(len(self.model.transformer_blocks)):
            streams = self.block(f"transformer_blocks.{i}", streams, time, joined)
        return self.out(streams[2], time, latents.shape)

    def with_image(self, frames, image):
        """The frames, and on further channels, where the model has them, the image in the first and nothing behind."""
        if self.model.config.in_channels == frames.shape[-1]:
            return frames
        given = torch.zeros_like(frames)
        if image is not None:
            given[:, 0] = torch.from_numpy(image)[:, 0]
        return torch.cat([frames, given], dim=-1)

    def patches(self, frames):
        frames = frames.permute(0, 1, 4, 2, 3)
        if self.model.config.patch_size_t is None:
            each = [self.apply("patch_embed.proj", frames[:, i]).flatten(2) for i in range(frames.shape[1])]
            return torch.cat(each, dim=2).transpose(1, 2)
        cells = frames.unfold(1, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2)  # [b, t, c, h, w, and frame, row, column inside]
        return self.apply("patch_embed.proj", cells.permute(0, 1, 3, 4, 2, 5, 6, 7).flatten(4).flatten(1, 3))

    def absolute(self, frames, height, width):
        c = self.model.config
        scales = c.spatial_interpolation_scale, c.temporal_interpolation_scale
        size = c.num_attention_heads * c.attention_head_dim
        return (
            get_3d_sincos_pos_embed(size, (width // 2, height // 2), frames, *scales, output_type="pt")
            .flatten(0, 1)
            .float()
        )

    def modulated(self, name, streams, time):
        """The three streams after adaLN `name`, and their gates."""
        time = F.silu(time)[:, None]
        shift, scale, gate, text_shift, text_scale, text_gate = self.apply(f"{name}.linear", time).chunk(6, dim=-1)
        own = self.apply(f"{name}.linear", time, reference_stream=True).chunk(6, dim=-1)[:3]
        modulation = [(text_shift, text_scale, text_gate), own, (shift, scale, gate)]
        norm = self.model.get_submodule(f"{name}.norm")
        streams = [norm(x) * (1 + b) + a for x, (a, b, _) in zip(streams, modulation, strict=True)]
        return streams, [gate for _, _, gate in modulation]

    def block(self, name, streams, time, table):
        lengths = [x.shape[1] for x in streams]
        x, gates = self.modulated(f"{name}.norm1", streams, time)
        x = self.attention(f"{name}.attn1", torch.cat(x, dim=1), lengths[0], table).split(lengths, dim=1)
        streams = [old + gate * new for old, gate, new in zip(streams, gates, x, strict=True)]
        x, gates = self.modulated(f"{name}.norm2", streams, time)
        x = self.apply(f"{name}.ff.net.0.proj", torch.cat(x, dim=1))
        x = self.apply(f"{name}.ff.net.2", F.gelu(x, approximate="tanh")).split(lengths, dim=1)
        return [old + gate * new for old, gate, new in zip(streams, gates, x, strict=True)]

    def attention(self, name, x, words, table):
        heads, size = self.model.config.num_attention_heads, self.model.config.attention_head_dim
        q, k, v = (
            self.apply(f"{name}.{part}", x).unflatten(-1, (heads, size)).transpose(1, 2)
            for part in ("to_q", "to_k", "to_v")
        )
        q, k = self.model.get_submodule(f"{name}.norm_q")(q), self.model.get_submodule(f"{name}.norm_k")(k)
        if table is not None:
            q, k = (torch.cat([y[:, :, :words], turned(y[:, :, words:], *table)], dim=2) for y in (q, k))
        weights = torch.softmax(q @ k.transpose(-1, -2) / size**0.5, dim=-1)
        return self.apply(f"{name}.to_out.0", (weights @ v).transpose(1, 2).flatten(2))

    def out(self, video, time, shape):
        x = self.model.proj_out(self.model.norm_out(self.model.norm_final(video), temb=time))
        b, t, h, w, c = shape
        span = self.model.config.patch_size_t or 1
        x = x.reshape(b, t // span, h // 2, w // 2, c, span, 2, 2)  # channel, then frame, row, column inside the patch
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t, h, w, c).numpy()


def turned(x, cos, sin):
    """Neighbouring channels as complex numbers, multiplied by e^(i·angle). The tables repeat every angle twice."""
    angle = torch.complex(cos[:, None, :, ::2], sin[:, None, :, ::2])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * angle).flatten(-2)


def random_adapter(model, seed=0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B, both random, for every module whose name ends in one of the targets."""
    torch.manual_seed(seed)
    adapter = {}
    for name, module in model.named_modules():
        if any(name == target or name.endswith("." + target) for target in TARGETS):
            out, fan_in, *window = module.weight.shape
            adapter[name] = (
                torch.randn(RANK, fan_in, *window) * (fan_in * int(np.prod(window))) ** -0.5,
                torch.randn(out, RANK, *(1 for _ in window)) * 0.5 * RANK**-0.5,
            )  # fmt: skip
    return adapter


# MARK: the comparisons


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def pair(request, tmp_path_factory):
    """(diffusers' model, the adapter, our model with that adapter, loaded from a file without alpha)."""
    theirs, ours = transformer_pair(**request.param)
    adapter = random_adapter(theirs)
    file = tmp_path_factory.mktemp("adapter") / "pytorch_lora_weights_transformer.safetensors"
    halves = {
        f"transformer.{n}.lora_{half}.weight": x.numpy()
        for n, ab in adapter.items()
        for half, x in zip("AB", ab, strict=True)
    }
    save_file(halves, file)
    adapter_files.load(ours, file, alpha=ALPHA)
    return theirs, adapter, ours


def given(ours, references, seed=0):
    frames = FRAMES + FRAMES % (ours.config.patch_size_t or 1)
    return inputs(ours.config, frames=frames, height=HEIGHT, width=WIDTH, references=references, seed=seed)


def picture(ours):
    """{"image": a first frame's latent} for a model that takes one."""
    latent = np.random.default_rng(9).standard_normal((2, 1, HEIGHT, WIDTH, 4)).astype(np.float32)
    return {"image": latent} if ours.config.takes_image else {}


def test_the_computation_above_is_diffusers_where_there_is_no_reference(pair):
    theirs, _, ours = pair
    arrays, image = given(ours, 0), picture(ours)
    assert_close(Peer(theirs, {}, "all")(*arrays, **image), run_theirs(theirs, *arrays, **image), relative=1e-5)


@pytest.mark.parametrize("mode", ["all", "reference"])
@pytest.mark.parametrize("references", [1, 3])
def test_references(pair, references, mode):
    theirs, adapter, ours = pair
    arrays, image = given(ours, references), picture(ours)
    found = run_ours(ours, *arrays, **image, adaln_lora=mode)
    assert_close(found, Peer(theirs, adapter, mode)(*arrays, **image))
    # What is compared depends on all of it.
    for other in (Peer(theirs, {}, mode), Peer(theirs, adapter, "reference" if mode == "all" else "all")):
        assert relative_error(found, other(*arrays, **image)) > 0.01
    assert relative_error(found, Peer(theirs, adapter, mode)(*arrays[:3], **image)) > 0.01


@pytest.mark.parametrize("mode", ["all", "reference"])
@pytest.mark.parametrize("references, kept", [(1, 7), (2, 11), (1, 1)])
def test_dropped_reference_tokens(pair, references, kept, mode):
    theirs, adapter, ours = pair
    arrays = given(ours, references, seed=1)
    rng = np.random.default_rng(kept)
    index = np.stack([np.sort(rng.permutation(references * TOKENS)[:kept]) for _ in range(2)])  # each example its own
    found = run_ours(ours, *arrays, index, adaln_lora=mode)
    assert_close(found, Peer(theirs, adapter, mode)(*arrays, index))
    assert relative_error(found, Peer(theirs, adapter, mode)(*arrays)) > 0.005


@pytest.mark.parametrize("mode", ["all", "reference"])
def test_an_adapter_without_a_reference(pair, mode):
    """With no reference stream, mode "reference" leaves the adaLN linears as they were."""
    theirs, adapter, ours = pair
    arrays = given(ours, 0)
    assert_close(run_ours(ours, *arrays, adaln_lora=mode), Peer(theirs, adapter, mode)(*arrays))


def test_references_are_told_apart_by_their_place(pair):
    """Swapping two references changes the result: the time axis tells them apart."""
    _, _, ours = pair
    latents, text, timesteps, reference = given(ours, 2)
    found = run_ours(ours, latents, text, timesteps, reference)
    assert relative_error(run_ours(ours, latents, text, timesteps, reference[:, ::-1]), found) > 0.005


def test_peft_injected_into_diffusers_does_the_same(pair):
    """Mode "all" with PEFT's own layers in place of our explicit matrices."""
    theirs, adapter, ours = pair
    model = inject_adapter_in_model(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)), copy.deepcopy(theirs)
    ).eval()
    filled = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith(".lora_A.default")
    }
    assert filled == set(adapter)
    with torch.no_grad():
        for name, (a, b) in adapter.items():
            model.get_submodule(f"{name}.lora_A.default").weight.copy_(a)
            model.get_submodule(f"{name}.lora_B.default").weight.copy_(b)
    arrays = given(ours, 2)
    assert_close(run_ours(ours, *arrays), Peer(model, {}, "all")(*arrays))
