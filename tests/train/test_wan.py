"""Wan in the training loop: the same configs, with another family."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sdv_jax.checkpoints import adapter_files
from sdv_jax.errors import UserError
from sdv_jax.objectives import text_to_video
from sdv_jax.train import config as configs
from sdv_jax.train import loop, plan, setup
from sdv_jax.train.devices import Devices
from tests.train import tiny
from tests.train.tiny_wan import config, data


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir, settings = tmp_path_factory.mktemp("wan"), config()
    return workdir, loop.run(settings, workdir, data=data(settings), shown=False)


def test_both_tasks_are_trained_and_the_adapter_says_where_references_stand(unbroken):
    workdir, result = unbroken
    assert result.finished and np.isfinite(losses(workdir)).all()
    tasks = {json.loads(line)["task"] for line in (workdir / "metrics.jsonl").read_text().splitlines()}
    assert tasks == {"identity", "motion"}
    about = json.loads((workdir / "adapter" / "adapter.json").read_text())
    assert about["family"] == "wan" and about["reference"] == {"placement": "after", "offset": 1, "shift": 1.0}
    assert set(about["targets"]) == {"to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"}
    fresh = setup.model(config(), setup.about(config()), token_ids=False).transformer
    info = adapter_files.load(fresh, workdir / "adapter")
    assert info.reference == about["reference"]


def test_a_resumed_run_is_the_unbroken_one(unbroken, tmp_path):
    settings = config()
    for steps in (2, 5, None):
        result = loop.run(settings, tmp_path, data=data(settings), shown=False, stop_after=steps)
    assert losses(tmp_path) == losses(unbroken[0])
    for ours, theirs in zip(jax.tree.leaves(_adapter(result)), jax.tree.leaves(_adapter(unbroken[1])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _adapter(result):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(result.model, nnx.LoRAParam))


@pytest.mark.parametrize(
    ("key", "value"),
    [("reference.placement", "before"), ("reference.shift", 0.0), ("reference.offset", 5), ("noise.shift", 1.0),
     ("identity.references", 2), ("motion.references", 3), ("lora.targets", ("to_q",))],
)
def test_fields_of_the_config_matter(unbroken, tmp_path, key, value):
    settings = config(**{key: value})
    loop.run(settings, tmp_path, data=data(settings), shown=False)
    assert losses(tmp_path) != losses(unbroken[0])


def test_more_references_than_views_are_refused(tmp_path):
    settings = config(**{"identity.references": 9})
    with pytest.raises(UserError, match="data.identity: 2 reference views .*, expected identity.references = 9 or"):
        loop.run(settings, tmp_path, data=data(settings), shown=False)


def test_what_wan_does_not_have_is_told(tmp_path):
    settings = config(**{"lora.adaln": "reference"})
    with pytest.raises(UserError, match="Wan has no such layers"):
        loop.run(settings, tmp_path, data=data(settings), shown=False)
    for key, value in (("placement", "after"), ("shift", 0.5), ("offset", 2)):
        with pytest.raises(UserError, match=f"reference.{key} is .*: CogVideoX takes references before the clip only"):
            loop.run(tiny.config(**{f"reference.{key}": value}), tmp_path, data=tiny.data(), shown=False)
    with pytest.raises(UserError, match="config key 'model.family': expected one of cogvideox, wan, found 'hunyuan'"):
        setup.about(tiny.config(model__family="hunyuan"))


@pytest.mark.parametrize("name", ["small_world_cogvideox", "small_world_wan"])
@pytest.mark.parametrize("path", ["models/small-world-cogvideox", "models/small-world-wan"])
def test_the_other_family_is_one_line_of_config(name, path):
    """References stand before the clip in both, with no shift: what CogVideoX does and Wan can."""
    settings = configs.load(f"configs/{name}.py", {"model.path": path})
    base = setup.about(settings)
    assert setup.objective(settings, base, base.traits.latents).geometry == base.traits.geometry


def test_a_first_frame_is_given_to_a_share_of_the_clips(tmp_path):
    wanted = {"train.objective": "text_to_video", "train.mode": "full", "train.steps": 2, "text_to_video.batch_size": 4}
    found = {}
    for share in (0.0, 0.5, 1.0):
        settings = config(**wanted, **{"text_to_video.first_frame": share})
        assert loop.run(settings, tmp_path / str(share), data=data(settings), shown=False).finished
        found[share] = losses(tmp_path / str(share))
    assert np.isfinite(list(found.values())).all() and len({tuple(values) for values in found.values()}) == 3
    objective = setup.objective(settings, setup.about(settings), data(settings)["motion"].scale)
    assert objective.clamps_image and objective.image_latents == objective.latents


def test_the_share_with_a_first_frame_is_of_the_rows_that_a_loss_gets(monkeypatch):
    """A part of a batch, or what is held out."""
    given = []
    monkeypatch.setattr(
        text_to_video, "_clips", lambda model, clips, empty, key, objective, count, timesteps: given.append(count)
    )
    settings = config(**{"train.objective": "text_to_video", "text_to_video.first_frame": 0.5})
    loss = plan.losses(settings, objective=None)["text_to_video"]
    for rows in (8, 4):
        loss(None, {"motion": {"text": np.zeros((rows, 3, 8))}}, None, jax.random.key(0))
    assert given == [4, 2]


def test_first_frames_need_a_model_that_takes_them_and_clips_that_go_on(tmp_path):
    wanted = {"train.objective": "text_to_video", "text_to_video.first_frame": 0.5}
    with pytest.raises(UserError, match="'text_to_video.first_frame': this model takes no first frame; leave it 0"):
        loop.run(tiny.config(**wanted), tmp_path, data=tiny.data(), shown=False)
    with pytest.raises(UserError, match="'model.index.expand_timestep' does not exist: known of wan are"):
        loop.run(config(**{"model.index.expand_timestep": True}), tmp_path, data=tiny.data(), shown=False)
    for share, parts in ((0.1, 1), (0.5, 4)):
        expected = f"{share} of batch_size 4 / train.accumulate {parts} is 0 clips; expected some with and some without"
        with pytest.raises(UserError, match=expected):
            config(**wanted | {"text_to_video.first_frame": share, "train.accumulate": parts,
                               "text_to_video.batch_size": 4})  # fmt: skip
    settings = config(**wanted | {"text_to_video.batch_size": 8})
    plan.check_size(settings, "motion", Devices(SimpleNamespace(size=4)))
    with pytest.raises(UserError, match="'text_to_video.first_frame': 4 of the 8 clips of a part cannot .* over 8 dev"):
        plan.check_size(settings, "motion", Devices(SimpleNamespace(size=8)))
    settings = config(**wanted)
    stills = {name: data(settings)["identity"] for name in ("identity", "motion")}
    with pytest.raises(UserError, match="data.motion: clips have one latent frame, expected more"):
        loop.run(settings, tmp_path, data=stills, shown=False)
