import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdv_jax.errors import UserError
from sdv_jax.models.contract import Geometry, LatentScale, check_defaults


def test_a_draw_has_the_moments_of_the_posterior():
    mean, logvar = jnp.full((200, 200), 2.0), jnp.full((200, 200), -1.0)
    found = np.asarray(LatentScale.factor(0.7).draw(mean, logvar, jax.random.key(0)))
    assert found.mean() == pytest.approx(0.7 * 2, abs=0.01)
    assert found.std() == pytest.approx(0.7 * np.exp(-0.5), abs=0.01)


def test_where_the_mean_counts_nothing_is_drawn():
    scale = LatentScale((1.0, -1.0), (2.0, 0.5), sampled=False)
    found = scale.draw(jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2)), jax.random.key(0))
    np.testing.assert_allclose(found, [[4.0, 2.5]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_to_vae_inverts_to_model(dtype):
    scale = LatentScale((0.3, -2.0, 0.0), (1.7, 0.4, 1.0))
    z = jax.random.normal(jax.random.key(1), (5, 3)).astype(dtype)
    back = scale.to_vae(scale.to_model(z))
    assert back.dtype == dtype
    np.testing.assert_allclose(back, z, atol=1e-6 if dtype == jnp.float32 else 0.1)


def _geometry(**changes):
    own = dict(height=64, width=64, num_frames=81, spatial=8, temporal=4, patch=2, channels=16, period=4)
    return Geometry(**own | changes)


def test_frames_that_come_out():
    """CogVideoX's VAE makes 8 of 5; Wan's makes 5."""
    assert [_geometry(period=8).decoded_frames(n) for n in (1, 5, 9, 13)] == [1, 8, 9, 16]
    assert [_geometry().decoded_frames(n) for n in (1, 5, 9, 13)] == [1, 5, 9, 13]


def test_surplus_fills_the_last_temporal_patch():
    assert [_geometry(frame_patch=2).surplus(n) for n in (1, 2, 21)] == [1, 0, 1]
    assert _geometry().surplus(21) == 0


def test_defaults_are_checked():
    assert check_defaults({"height": 32, "guidance": 1}, "d") == {"height": 32, "guidance": 1}
    for wrong, told in (({"hight": 3}, "unknown key hight"), ({"height": 1.5}, "whole number"), ({"fps": 0}, "> 0")):
        with pytest.raises(UserError, match=told):
            check_defaults(wrong, "d")
