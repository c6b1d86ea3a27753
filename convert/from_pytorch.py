"""A published model (diffusers folder, Wan's original release, Hugging Face id) to a folder of this project.

`sdv convert` as a script:

python convert/from_pytorch.py SRC DST [--dtype=float32|bfloat16] [--verify]
"""

from absl import app, flags
from command import run

from sdv_jax.checkpoints.convert import convert

_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the stored weights; absent: as in the source")
_VERIFY = flags.DEFINE_bool("verify", False, "compare every component with diffusers before DST appears (needs torch)")


def main(arguments):
    run(arguments, "SRC DST", lambda src, dst: convert(src, dst, dtype=_DTYPE.value, verify=_VERIFY.value))


if __name__ == "__main__":
    app.run(main)
