"""`W -> a W` at a fixed epsilon: what it changes, and two predictions. All in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bnjax import batch_norm
from experiments.scaling.laws import crossings, labels
from experiments.scaling.networks import Layers, Problem, cast, derivatives, hidden, of_layers, scaled

PREDICTED = ("outputs", "gradient to the first W", "gradient to the last W")


def response(fixed: Callable, traced: Layers, p: Problem, epsilon: float, factors) -> xr.Dataset:
    """W -> a W in all layers at a fixed epsilon: the change, and what predicts it.

    As f(a W, a^2 epsilon) = f(W, epsilon), it is the change at epsilon -> epsilon / a^2. To first order that is
    (epsilon / a^2 - epsilon) df / d epsilon. The gradient of a ReLU network is not differentiable where a sample is
    at a kink: what jumps there the first order misses.

    Args:
      fixed: the program of `bnjax.mlp` at this epsilon, by which the change is measured.
      traced: the layers by which it is predicted.
      p: the network and its batch.
      epsilon: above 0.
      factors: the a, none of them 1.

    Returns:
      [factor_at_epsilon, predicted]: `measured` and `first_order` changes over what changes, and what the
      predictions leave of the measured change: `exact_error`, `first_order_error`. [factor_at_epsilon]:
      `crossed_at_epsilon`, how many activations come to the other side of 0.
    """
    depth = len(p.params) - 1
    p = cast(p, np.float64)
    norm = np.linalg.norm

    def picked(d, a=1.0):
        gradients = [a * d.to_params[name]["kernel"] for name in ("hidden_0", f"hidden_{depth - 1}")]
        return [d.outputs, *gradients]

    def of_epsilon(value):
        return picked(derivatives(traced, p.params, p.x, p.cotangent, value * jnp.ones(depth)))

    rows, crossed = [], []
    with jax.enable_x64(True):
        predict = jax.jit(lambda value: jax.jvp(of_epsilon, (value,), (1.0,)))
        at_epsilon, slope = predict(epsilon)
        before = fixed(p, of_layers(0.0, depth))
        for a in factors:
            after = fixed(scaled(p, hidden(depth), a), of_layers(0.0, depth))
            crossed.append(crossings(after, before))
            there, _ = predict(epsilon / (a * a))
            for old, new, start, end, rate in zip(
                picked(before), picked(after, a), at_epsilon, there, slope, strict=True
            ):
                change, linear = new - old, (epsilon / (a * a) - epsilon) * rate
                errors = norm(change - (end - start)) / norm(change), norm(change - linear) / norm(change)
                rows.append([norm(change) / norm(old), norm(linear) / norm(old), *errors])
    names = "measured", "first_order", "exact_error", "first_order_error"
    values = np.reshape(rows, (len(factors), len(PREDICTED), len(names)))
    found = {name: (("factor_at_epsilon", "predicted"), values[..., i]) for i, name in enumerate(names)}
    found["crossed_at_epsilon"] = (("factor_at_epsilon",), crossed)
    return xr.Dataset(found, {"factor_at_epsilon": factors, "predicted": labels(PREDICTED)})


def inner_products(fixed: Callable, traced: Callable, p: Problem, epsilon: float) -> np.ndarray:
    """<W, dL/dW> of each layer at a fixed epsilon.

    d/da of f(a W, a^2 epsilon) = f(W, epsilon) in one layer, at a = 1, is <W, dL/dW> + 2 epsilon dL/d epsilon = 0.
    And x_hat = (z - mean) / sigma with sigma^2 = var + epsilon has d x_hat / d epsilon = -x_hat / (2 sigma^2), so
    that, with delta the gradient to x_hat,

        <W, dL/dW> = -2 epsilon dL/d epsilon = epsilon sum_f (1 / sigma_f^2) sum_n delta_nf x_hat_nf

    Args:
      fixed: the program of `bnjax.mlp` at this epsilon.
      traced: the program of `layers_of_epsilon`.
      p: the network and its batch.
      epsilon: above 0.

    Returns:
      [3, L]: the three sides, by autodiff of `bnjax.mlp`, by autodiff in epsilon, and by the sum.
    """
    depth = len(p.params) - 1
    p = cast(p, np.float64)
    rows = []
    with jax.enable_x64(True):
        d = fixed(p, of_layers(epsilon, depth))
        to_epsilon = traced(p, of_layers(epsilon, depth)).to_epsilon
        for name, derivative in zip(hidden(depth), to_epsilon, strict=True):
            x_hat, inv_sigma = batch_norm.standardize(d.shown[f"{name}/preactivation"], epsilon)
            delta = d.to_shown[f"{name}/norm"] * p.params[name]["norm"].scale
            inner = (p.params[name]["kernel"] * d.to_params[name]["kernel"]).sum()
            rows.append([inner, -2 * epsilon * derivative, epsilon * (inv_sigma**2 * delta * x_hat).sum()])
    return np.array(rows, float).T


def measure(
    fixed: Callable, traced: Layers, run_traced: Callable, p: Problem, epsilon: float, factors
) -> xr.Dataset:
    """`response` for the factors and a grid from 1/1000 to 10, and `inner_products`; `run_traced`: a program."""
    grid = np.union1d(10.0 ** np.arange(-3, 1.1, 0.25), factors)
    found = response(fixed, traced, p, epsilon, grid[grid != 1])
    products = inner_products(fixed, run_traced, p, epsilon)
    found["inner_product"] = (("side", "layer"), products)
    sides = labels(("<W, dL/dW>", "-2 epsilon dL/d epsilon", "sum"))
    found = found.assign_coords(side=sides, layer=labels(hidden(len(p.params) - 1)))
    return found.expand_dims(fixed_epsilon=[epsilon])
