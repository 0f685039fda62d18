"""The changes by W -> a W at a fixed epsilon, and their prediction."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import batch_norm, plots
from bnjax.findings import Check, Finding
from experiments.scale_laws import common, networks
from experiments.scale_laws.common import KINKED, Settings, by_seed
from experiments.scale_laws.networks import Problem
from experiments.scale_laws.one_step import crossings
from experiments.table import Table

PREDICTED = ["outputs", "gradient to the first W", "gradient to the last W"]
SIDES = ["<W, dL/dW>", "-2 epsilon dL/d epsilon", "sum"]
LARGEST_GAP = 1e-6  # relative, between what is equal but for rounding
ROUNDED_GAP = 1e-14  # absolute: <W, dL/dW> is a sum of terms of order 1 that cancel, whatever is left of it
ROUNDED_CHANGE = 1e-12  # absolute: a change is the difference of two evaluations


def response(fixed: Callable, traced: bnjax.Model, p: Problem, epsilon: float, factors: Sequence[float]) -> xr.Dataset:
    """W -> a W in all layers at a fixed epsilon: the change, and what predicts it; in float64.

    As f(a W, a^2 epsilon) = f(W, epsilon), it is the change at epsilon -> epsilon / a^2. To first order that is
    (epsilon / a^2 - epsilon) df / d epsilon. The gradient of a ReLU network is not differentiable where a sample is
    at a kink: what jumps there the first order misses.

    `fixed` is the program of the network whose epsilon is constant, which measures; `traced` the one that predicts.

    Returns:
      [factor_at_epsilon, predicted]: `measured` and `first_order` changes over what changes, and what the
      predictions leave of the measured change: `exact_error`, `first_order_error`. [factor_at_epsilon]:
      `crossed_at_epsilon`, how many activations come to the other side of 0.
    """
    p, norm, rows, crossed = p.cast(np.float64), np.linalg.norm, [], []

    def picked(d, a=1.0):
        return [d.outputs, *(a * d.to_params[name]["kernel"] for name in (p.hidden[0], p.hidden[-1]))]

    def of_epsilon(value):
        return picked(networks.derivatives(traced, p._replace(epsilon=value * jnp.ones(len(p.hidden)))))

    with jax.enable_x64(True):
        predict = jax.jit(lambda value: jax.jvp(of_epsilon, (value,), (1.0,)))
        at_epsilon, slope = predict(epsilon)
        before = fixed(p)
        for a in factors:
            after = fixed(p.scaled(p.hidden, a))
            crossed.append(crossings(after, before))
            there, _ = predict(epsilon / (a * a))
            each = picked(before), picked(after, a), at_epsilon, there, slope
            for old, new, start, end, rate in zip(*each, strict=True):
                change, linear = new - old, (epsilon / (a * a) - epsilon) * rate
                errors = norm(change - (end - start)) / norm(change), norm(change - linear) / norm(change)
                rows.append([norm(change) / norm(old), norm(linear) / norm(old), *errors])
    names = ["measured", "first_order", "exact_error", "first_order_error"]
    coords = {"factor_at_epsilon": factors, "predicted": PREDICTED, "name": names}
    found = xr.DataArray(np.reshape(rows, [len(one) for one in coords.values()]), coords).to_dataset("name")
    return found.assign(crossed_at_epsilon=("factor_at_epsilon", crossed))


def inner_products(fixed: Callable, traced: Callable, p: Problem, epsilon: float) -> np.ndarray:
    """[SIDES, L] <W, dL/dW> at a fixed epsilon: by autodiff of all parameters, by autodiff in epsilon, and by a sum.

    d/da of f(a W, a^2 epsilon) = f(W, epsilon) in one layer, at a = 1, is <W, dL/dW> + 2 epsilon dL/d epsilon = 0.
    And x_hat = (z - mean) / sigma with sigma^2 = var + epsilon has d x_hat / d epsilon = -x_hat / (2 sigma^2), so
    that, with delta the gradient to x_hat,

        <W, dL/dW> = -2 epsilon dL/d epsilon = epsilon sum_f (1 / sigma_f^2) sum_n delta_nf x_hat_nf

    `fixed` and `traced` are programs of the network whose epsilon is constant, and of that whose epsilon is traced.
    """
    p, rows = p.cast(np.float64).at(epsilon), []
    with jax.enable_x64(True):
        d, to_epsilon = fixed(p), traced(p).to_params["epsilon"]
        for name, derivative in zip(p.hidden, to_epsilon, strict=True):
            x_hat, inv_sigma = batch_norm.standardize(d.intermediates[f"{name}/preactivation"], epsilon)
            delta = d.to_intermediates[f"{name}/norm"] * p.params[name]["norm"].scale
            inner = (p.params[name]["kernel"] * d.to_params[name]["kernel"]).sum()
            rows.append([inner, -2 * epsilon * derivative, epsilon * (inv_sigma**2 * delta * x_hat).sum()])
    return np.array(rows, float).T


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """`response` for the factors and a grid from 1/1000 to 10, and `inner_products`."""
    traced = networks.network(settings, epsilon=None)
    run_traced = networks.program(traced)
    fixed = {value: networks.program(networks.network(settings, epsilon=value)) for value in settings.epsilon}
    grid = np.union1d(10.0 ** np.arange(-3, 1.1, 0.25), settings.factors)

    def at_epsilon(p, value):
        found = response(fixed[value], traced, p, value, grid[grid != 1])
        found["inner_product"] = ("side", "layer"), inner_products(fixed[value], run_traced, p, value)
        return found.assign_coords(side=SIDES, layer=p.hidden).expand_dims(fixed_epsilon=[value])

    return networks.over_seeds(settings, lambda p: [partial(at_epsilon, p, value) for value in settings.epsilon])


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The identity of inner products; both predictions."""
    products, predicted = [], []
    for value in results.fixed_epsilon.values:
        sides = results.inner_product.sel(fixed_epsilon=value)
        size = by_seed(np.abs(sides.isel(side=0)))
        gap = np.abs(sides - sides.isel(side=0)).max(("side", "layer"), skipna=False).values / size
        most = max(LARGEST_GAP, ROUNDED_GAP / size.min())
        products.append(Check(f"epsilon {value:g}: largest |<W, dL/dW>|", size))
        products.append(Check(f"epsilon {value:g}: distance of the forms over it", gap, below=most, holds="all"))
    most = max(LARGEST_GAP, ROUNDED_CHANGE / float(results.measured.min()))
    missed = results.exact_error.max(("fixed_epsilon", "factor_at_epsilon", "predicted"), skipna=False)
    predicted.append(Check("f(W, epsilon / a^2) misses of the change", missed.values, below=most, holds="all"))
    crossed = (results.crossed_at_epsilon > 0) & (settings.activation in KINKED)
    for words, cases in {"no sample crosses a kink": ~crossed, "samples cross a kink": crossed}.items():
        error = results.first_order_error.where(cases)
        # The second order alone would miss about as much as the relative change: a ratio of about 1.
        for of, values in {"of it": error, "over the change expected": error / results.first_order}.items():
            worst = by_seed(values)
            if len(worst := worst[~np.isnan(worst)]):
                predicted.append(Check(f"first order misses {of}, where {words}", worst))
    identity = "At a fixed epsilon, <W, dL/dW> is -2 epsilon dL/d epsilon, and epsilon sum_f (1 / sigma_f^2) sum_n "
    identity += "delta_nf x_hat_nf, in float64."
    prediction = "W -> a W in all layers at a fixed epsilon does what epsilon -> epsilon / a^2 does, for all a."
    note = "Gradients jump where samples cross a kink, which first order in epsilon misses." if crossed.any() else ""
    return [Finding(identity, checks=products), Finding(prediction, checks=predicted, note=note)]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Predicted against measured."""
    some = results.sel(factor_at_epsilon=list(settings.factors)).median("seed")
    some = some.rename(fixed_epsilon="epsilon", factor_at_epsilon="a", crossed_at_epsilon="crossed")
    columns = {"change": some.measured, "1st order": some.first_order, "misses": some.first_order_error}
    columns |= {"exact misses": some.exact_error, "crossed": some.crossed}
    caption = "Relative changes, and what first order in epsilon and (exact) f(W, epsilon / a^2) miss of them; medians "
    caption += "over seeds. Crossed: activations on two sides of 0."
    title = "W -> a W in all layers at a FIXED epsilon, float64"
    return [common.table(title, ("epsilon", "a", "predicted"), columns, caption)]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """The change of the outputs, measured and to first order."""
    grid = sorted({1.0, *results.factor_at_epsilon.values})  # at 1 nothing changes: a gap
    at = results.sel(predicted="outputs").reindex(factor_at_epsilon=grid)
    points = {f"epsilon {value:g}": at.measured.sel(fixed_epsilon=value) for value in settings.epsilon}
    lines = {f"{value:g}, first order": at.first_order.sel(fixed_epsilon=value) for value in settings.epsilon}
    how = {"xlabel": "a, of all hidden layers", "yscale": "log", "theory": [*lines], "unconnected": [*points]}
    panel = plots.Panel("at a fixed epsilon", "relative change of the outputs", points | lines, **how)
    return plots.panels([panel], title=f"W → aW in {settings.depth} layers of {settings.width} with BN")


CLAIM = common.claim("epsilon", __doc__, measure=measure, judge=judge, figure=figure, must_hold=True, tables=tables)
