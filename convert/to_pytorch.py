"""A folder of this project back to a diffusers pipeline folder: `sdv export` as a script.

python convert/to_pytorch.py MODEL OUT
"""

from absl import app
from command import run

from sdv_jax.checkpoints.convert import export

if __name__ == "__main__":
    app.run(lambda arguments: run(arguments, "MODEL OUT", export))
