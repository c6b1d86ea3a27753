"""The axis vocabulary of every signature in the package.

b batch · t latent frames · h w latent grid · c channels · n tokens · d model width · k head dimension
s text tokens · e text embedding width · r reference tokens · l layers · p patch

Pixels use the same letters as latents ([b, t, h, w, c]); docstrings say which of the two a function takes.
"""

from jax import Array
from jaxtyping import Bool, Float, Int, Key, UInt8

__all__ = ["Array", "Bool", "Float", "Int", "Key", "UInt8"]
