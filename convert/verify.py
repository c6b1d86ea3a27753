"""A converted model against its source, component by component, on random inputs. Exit status 2 above the tolerance.

python convert/verify.py SRC MODEL [--tolerance=1e-3] [--seed=0]
"""

from absl import app, flags
from command import run

from sdv_jax.checkpoints import verify

_TOLERANCE = flags.DEFINE_float("tolerance", verify.TOLERANCE, "largest relative error allowed")
_SEED = flags.DEFINE_integer("seed", 0, "of the random inputs")


def main(arguments):
    run(
        arguments,
        "SRC MODEL",
        lambda src, model: verify.verify(src, model, tolerance=_TOLERANCE.value, seed=_SEED.value),
    )


if __name__ == "__main__":
    app.run(main)
