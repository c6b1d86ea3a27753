"""FLOPs of a program and of its gradient, counted in its jaxpr: matrix products and convolutions, loops as often as
they run.

A product of m × k and k × n costs 2 m k n. Everything else in these models is small beside that. The backward pass has
a product of the same cost for each factor that needs a gradient, which is one that depends on a trained weight.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params

# GPU kernels of attention, which a jaxpr shows as one call: two products of heads of [n, k] and [m, k].
_FLASH = "dot_product_attention_fwd"


def count(function: Callable, trained, *arguments) -> tuple[float, float]:
    """(FLOPs of `function(trained, *arguments)`, FLOPs of its backward pass for the leaves of `trained`).

    Nothing is counted twice for recomputation. Arguments may be `jax.ShapeDtypeStruct`s; nothing is run.
    """
    jaxpr = jax.make_jaxpr(function)(trained, *arguments).jaxpr
    given = len(jax.tree.leaves(trained))
    cost, _ = _walk(jaxpr, [number < given for number in range(len(jaxpr.invars))])
    return float(cost[0]), float(cost[1])


def _walk(jaxpr, marks: Sequence[bool]) -> tuple[np.ndarray, list[bool]]:
    """([forward, backward], which outputs need a gradient), where `marks` says which inputs do."""
    needed = {variable for variable, mark in zip(jaxpr.invars, marks, strict=True) if mark}

    def needs(variable) -> bool:
        return not isinstance(variable, Literal) and variable in needed

    total = np.zeros(2)
    for equation in jaxpr.eqns:
        cost, out = _equation(equation, [needs(variable) for variable in equation.invars])
        total += cost
        needed |= {v for v, mark in zip(equation.outvars, out, strict=True) if mark and _has_gradient(v)}
    return total, [needs(variable) for variable in jaxpr.outvars]


def _has_gradient(variable) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.inexact)


def _equation(equation, marks: list[bool]) -> tuple[np.ndarray, list[bool]]:
    name, params = equation.primitive.name, equation.params
    out = [any(marks)] * len(equation.outvars)
    if (own := _product(equation, marks)) is not None:
        return own, out
    if name == "scan":
        consts = params["num_consts"]
        cost, out = _loop(params["jaxpr"].jaxpr, marks, consts, consts + params["num_carry"])
        return cost * params["length"], out
    if name == "while":
        test, consts = params["cond_nconsts"], params["body_nconsts"]
        return _loop(params["body_jaxpr"].jaxpr, marks[test:], consts, len(marks) - test)
    inner = list(jaxprs_in_params(params))
    if name == "cond":
        found = [_walk(branch, marks[1:]) for branch in inner]
        out = [any(each) for each in zip(*(marked for _, marked in found), strict=True)]
        return max((cost for cost, _ in found), key=sum), out
    if len(inner) == 1 and len(inner[0].invars) == len(marks) and len(inner[0].outvars) == len(out):
        return _walk(inner[0], marks)
    return sum((_walk(sub, [any(marks)] * len(sub.invars))[0] for sub in inner), np.zeros(2)), out


def _loop(body, marks: list[bool], start: int, stop: int) -> tuple[np.ndarray, list[bool]]:
    """One turn of a loop whose inputs from `start` to `stop` are the first outputs of the turn before."""
    while True:
        cost, out = _walk(body, marks)
        carried = [a or b for a, b in zip(marks[start:stop], out, strict=False)]
        if carried == marks[start:stop]:
            return cost, carried + out[stop - start :]
        marks = [*marks[:start], *carried, *marks[stop:]]


def _product(equation, marks: list[bool]) -> np.ndarray | None:
    """[forward, backward] of a product; None for every other equation."""
    name, shapes = equation.primitive.name, [getattr(v.aval, "shape", ()) for v in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(shapes[0][axis] for axis in contracted)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth * np.array([1, sum(marks)])
    if name == "conv_general_dilated":
        numbers = equation.params["dimension_numbers"]
        kernel = math.prod(shapes[1]) / shapes[1][numbers.rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * kernel * np.array([1, sum(marks)])
    if name.startswith(_FLASH):
        (b, n, heads, k), m = shapes[0], shapes[1][1]
        query, key, value = marks[:3]
        return 2.0 * b * heads * n * m * k * np.array([2, query + key + (query or key) + value])
    return None
