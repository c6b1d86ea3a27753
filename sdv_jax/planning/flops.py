"""FLOPs of a program, counted in its jaxpr: matrix products and convolutions, loops as often as they run.

A product of m × k and k × n costs 2 m k n. Everything else in these models is small beside that.
"""

import math
from collections.abc import Callable

import jax
from jax.extend.core import jaxprs_in_params

# GPU kernels of attention, which a jaxpr shows as one call: two products of heads of [n, k] and [m, k].
_FLASH = "dot_product_attention_fwd"


def count(function: Callable, *arguments) -> tuple[float, float]:
    """(FLOPs of products with weights, FLOPs of products of activations with each other) of `function(*arguments)`.

    A product with batch axes is one of activations, as in attention, any other one of activations with weights.
    Arguments may be `jax.ShapeDtypeStruct`s; nothing is run.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> tuple[float, float]:
    weights = activations = 0.0
    for equation in jaxpr.eqns:
        own, pairs = _own(equation)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [_count(sub) for sub in jaxprs_in_params(equation.params)] if own + pairs == 0 else []
        if equation.primitive.name == "cond" and inner:
            inner = [max(inner)]
        weights += own + times * sum(found[0] for found in inner)
        activations += pairs + times * sum(found[1] for found in inner)
    return weights, activations


def _own(equation) -> tuple[float, float]:
    """What one equation costs itself, apart from the programs inside it."""
    name, shapes = equation.primitive.name, [getattr(v.aval, "shape", ()) for v in equation.invars]
    if name == "dot_general":
        (contracted, _), (batch, _) = equation.params["dimension_numbers"]
        depth = math.prod(shapes[0][axis] for axis in contracted)
        cost = 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
        return (0.0, cost) if batch else (cost, 0.0)
    if name == "conv_general_dilated":
        numbers = equation.params["dimension_numbers"]
        kernel = math.prod(shapes[1]) / shapes[1][numbers.rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * kernel, 0.0
    if name.startswith(_FLASH):
        (b, n, heads, k), m = shapes[0], shapes[1][1]
        return 0.0, 4.0 * b * heads * n * m * k
    return 0.0, 0.0
