"""Convolutions as matrix products, for training on a CPU.

    apply = on_cpu(apply)       # the same function, with products in the place of its convolutions

XLA's CPU backend is fast at convolutions with their dimensions in one order: N, spatial, features. It brings others
into that order, but not inside of a loop, and the gradients of a convolution are always others: in a loop they take up
to 50 times as long as by themselves. Under vmap a convolution becomes a grouped one, which is slow as well. A matrix
product is slowed by neither. So a convolution is one here: slices of the input, shifted to each position of the kernel
and put side by side, times the kernel. Its gradients are those of slices and a product. `gains` has figures.

What else was measured: one product for each position, summed, takes up to twice as long;
`lax.conv_general_dilated_patches`, a grouped convolution itself, up to 6 times; slices with the features first 1.3 to
1.7 times, but for a single feature. Gradients by convolutions in XLA's fast order take as long, but under vmap 3 to 4
times as long.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Num

PATCHES_BYTES = 2**29

# The programs inside of equations. Those of custom_jvp and custom_vjp are left: changed, they would lose their rules.
BODIES = {
    core.primitives.jit_p: ("jaxpr",),
    core.primitives.remat_p: ("jaxpr",),
    core.primitives.closed_call_p: ("call_jaxpr",),
    core.primitives.scan_p: ("jaxpr",),
    core.primitives.while_p: ("cond_jaxpr", "body_jaxpr"),
    core.primitives.cond_p: ("branches",),
}


def on_cpu(function: Callable) -> Callable:
    """The same function, with `as_product` in the place of each convolution that `gains`.

    It finds the convolutions in jit, checkpoint, loops and branches, but not in functions with derivatives of their
    own (custom_jvp, custom_vjp). It pays in training: without gradients, a product takes 2 to 3 times as long as a
    convolution of one network does.

    Args:
      function: of pytrees of arrays. Keyword arguments are passed on as they are, not traced.

    Returns:
      A function of the same arguments, to be transformed like any other. Its results are the same to rounding. Where
      no convolution gains it calls `function`: the compiled program is the same.
    """

    @functools.wraps(function)
    def evaluate(*args, **kwargs):
        program, shapes = jax.make_jaxpr(functools.partial(function, **kwargs), return_shape=True)(*args)
        replaced = _replaced(program)
        if replaced is program:
            return function(*args, **kwargs)
        outputs = core.jaxpr_as_fun(replaced)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return evaluate


def _replaced(program):
    """A jaxpr, closed or not, or a tuple of them, with products for the convolutions; itself if none gains."""
    if isinstance(program, tuple):
        branches = tuple(map(_replaced, program))
        return branches if _differ(branches, program) else program
    inner = getattr(program, "jaxpr", program)  # itself, where it is not closed and in later versions of JAX
    eqns = list(map(replaced_equation, inner.eqns))
    if not _differ(eqns, inner.eqns):
        return program
    replaced = inner.replace(eqns=eqns)
    return replaced if inner is program else program.replace(jaxpr=replaced)


def replaced_equation(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """An equation of a jaxpr with products for the convolutions in it; itself if none gains."""
    if eqn.primitive is lax.conv_general_dilated_p:
        operands = [v.aval for v in eqn.invars]
        if not gains(*operands, eqn.params):
            return eqn
        product = jax.jit(functools.partial(as_product, **eqn.params))  # under jit it is a single equation
        (call,) = jax.make_jaxpr(product)(*operands).eqns
        return eqn.replace(primitive=call.primitive, params=call.params)
    names = BODIES.get(eqn.primitive, ())
    old = [eqn.params[name] for name in names]
    new = list(map(_replaced, old))
    return eqn.replace(params=eqn.params | dict(zip(names, new, strict=True))) if _differ(new, old) else eqn


def _differ(new, old):
    return any(a is not b for a, b in zip(new, old, strict=True))


def gains(lhs: Any, rhs: Any, params: Mapping[str, Any]) -> bool:
    """True if `as_product` is faster than the convolution where a CPU trains in a compiled loop: by shapes alone.

    Args:
      lhs: has the shape and dtype of the input.
      rhs: has the shape of the kernel.
      params: of the primitive `lax.conv_general_dilated_p`.
    """
    # It always was. Milliseconds of CPU time for one step of SGD on kernel and input, batch 128, float32, jax 0.10, on
    # 2 cores:                           convolution           product
    #                                  by itself  in a loop    in a loop  4 networks under vmap, each
    # 3x3, 1 -> 8, 28 x 28, kernel only       12         18            6            4
    # 3x3, 8 -> 16, 28 x 28                   55        460           61           73
    #   with stride 2                         20        104           17           24
    # 5x5                                    102       1313          143          179
    # 7x7                                    343       2478          306          405
    # 1x1                                     31         68           11           18
    # 3x3, 64 -> 64, 8 x 8                    57       1751           59           77
    # 3x3, 64 -> 64, 32 x 32                4307          -         1188            -
    # 3x3, 32 groups of 1, 14 x 14            95        679           85          100
    # 3x3, 256 groups of 1, 7 x 7            361      19375          183            -
    # 5, 8 -> 16, 256                          6        131            6            9
    # 11x11, 8 -> 16, 28 x 28, batch 32       75        997          241            -
    # What limits it is memory, of patches as many times as large as the input as the kernel has positions.
    if params["batch_group_count"] > 1:
        return False
    out = jax.eval_shape(functools.partial(lax.conv_general_dilated_p.bind, **params), lhs, rhs)
    numbers = params["dimension_numbers"]
    places = math.prod(out.shape) // max(1, out.shape[numbers.out_spec[1]])
    entries = math.prod(rhs.shape) // max(1, rhs.shape[numbers.rhs_spec[0]]) * params["feature_group_count"]
    return places * entries * lhs.dtype.itemsize <= PATCHES_BYTES


def as_product(lhs: Num[jax.Array, "..."], rhs: Num[jax.Array, "..."], **params: Any) -> Num[jax.Array, "..."]:
    """The result of `lax.conv_general_dilated_p` on the same arguments, to rounding, by a matrix product.

    Args:
      lhs: input; N, C features and any number of spatial dimensions, in the order of `dimension_numbers`.
      rhs: kernel; O features of the output, C / `feature_group_count`, and spatial dimensions, likewise.
      **params: of the primitive, all of them. Where it has a `batch_group_count`, as in gradients of grouped
        convolutions, and where there is nothing to compute, the primitive itself is called.

    Returns:
      N, O and spatial dimensions, likewise.
    """
    convolve = functools.partial(lax.conv_general_dilated_p.bind, **params)
    out = jax.eval_shape(convolve, lhs, rhs)
    if params["batch_group_count"] > 1 or 0 in (*out.shape, *rhs.shape):
        return convolve(lhs, rhs)
    # Gradients form the patches anew, which costs no time, rather than have those of all layers wait in memory. (The
    # compiler of jax 0.10 keeps them all the same: of 12 layers it needs 140 MB where that of 0.12 needs 47.)
    return jax.checkpoint(functools.partial(_product, sizes=out.shape, params=params))(lhs, rhs)


def _product(lhs, rhs, sizes, params):
    """In the order N, spatial, features throughout; with K positions of the kernel and G groups of features."""
    (n, c, *space), (o, i, *window), (out_n, out_c, *out_space) = params["dimension_numbers"]
    dilation, strides = params["lhs_dilation"], params["window_strides"]
    padding = [(*pair, step - 1) for pair, step in zip(params["padding"], dilation, strict=True)]
    lhs = lax.transpose(lhs, (n, *space, c))
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    rhs = lax.transpose(rhs, (*window, i, o))

    def shifted(position):
        start = [p * step for p, step in zip(position, params["rhs_dilation"], strict=True)]
        reach = [(sizes[d] - 1) * step + 1 for d, step in zip(out_space, strides, strict=True)]
        stop = [a + b for a, b in zip(start, reach, strict=True)]
        return lax.slice(lhs, (0, *start, 0), (lhs.shape[0], *stop, lhs.shape[-1]), (1, *strides, 1))

    slices = [shifted(position) for position in np.ndindex(*rhs.shape[:-2])]
    patches = lax.concatenate(slices, lhs.ndim - 1)
    by_group = (len(slices), params["feature_group_count"], rhs.shape[-2])
    patches = patches.reshape(*patches.shape[:-1], *by_group)  # [N, ..., K, G, C / G]
    kernel = rhs.reshape(by_group[0], by_group[2], by_group[1], -1)  # [K, C / G, G, O / G]
    k, g, features = range(patches.ndim - 3, patches.ndim)
    product = lax.dot_general(
        patches,
        kernel,
        (((k, features), (0, 1)), ((g,), (2,))),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    product = jnp.moveaxis(product, 0, -2)  # [N, ..., G, O / G]
    product = product.reshape(*product.shape[:-2], rhs.shape[-1])
    return lax.transpose(product, np.argsort([out_n, *out_space, out_c]))
