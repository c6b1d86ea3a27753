"""How parity is judged everywhere: the largest absolute difference over the largest magnitude of the peer's output."""

import numpy as np


def relative_error(ours, theirs) -> float:
    """max|ours - theirs| / max|theirs| after both became float64 numpy arrays; raises on unequal shapes."""
    ours, theirs = (np.asarray(_plain(x), np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"shapes differ: ours {ours.shape}, theirs {theirs.shape}"
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def assert_close(ours, theirs, relative: float = 1e-4) -> None:
    """Fails when the relative error exceeds `relative`, or when either side holds NaN."""
    error = relative_error(ours, theirs)
    assert error <= relative, f"relative error {error:.3e} exceeds {relative:.1e}"


def _plain(x):
    return x.detach().float().cpu().numpy() if hasattr(x, "detach") else x
