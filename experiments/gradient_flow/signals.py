"""Signals forward and gradients backward, layer by layer, at a few scales; and the layers' Jacobians."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots, probes
from bnjax.findings import Check, Finding
from experiments.claim import Claim
from experiments.gradient_flow import common
from experiments.gradient_flow.common import FLAT, NORM_NAMES, Settings
from experiments.table import Table

# {column: (quantity, its unit)}
RANKS = {"saturated": ("shown_activation_saturated", "%"), "dead": ("shown_activation_dead", "%"),
         "stable rank": ("shown_activation_stable_rank", "")}  # fmt: skip
SPREADS = {"W x: mean": ("shown_preactivation_mean", ""), "spread": ("shown_preactivation_spread", "")}
BACKWARD = {"gradient to W": ("weight_gradient", ""), "to W x": ("preactivation_gradient", ""),
            "J: largest": ("jacobian_largest", ""), "median": ("jacobian_median", ""),
            "share": ("jacobian_share", "%")}  # fmt: skip


def signals(network, x, y):
    """A program for `common.measure`."""

    def one(state):
        found = {name: signal for name, signal in probes.signals(network, *state, x).items() if name != "output"}
        return {f"{name}_{field}": getattr(signal, field) for name, signal in found.items() for field in signal._fields}

    return lambda *states: jax.lax.map(one, states)


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """Signals at the first depth; gradients of the first activation at the first and the last depth; Jacobians."""
    depth, scales = settings.depths[0], settings.shown_scales
    ends = tuple(dict.fromkeys((depth, settings.depths[-1])))
    some = dataclasses.replace(settings, activations=settings.activations[:1], depths=ends)
    results = common.measure(some, ds, scales, common.gradients(settings)).isel(activation=0, drop=True)
    shown = common.measure(dataclasses.replace(settings, depths=(depth,)), ds, scales, signals)
    shown = shown.isel(depth=0, drop=True).reindex(layer=results.layer)
    results = results.merge(shown.rename({name: f"shown_{name}" for name in shown.data_vars}))
    return results.assign({f"jacobian_{name}": values for name, values in jacobians(settings, ds).items()})


def jacobians(settings: Settings, ds: bnjax.Dataset) -> dict[str, tuple]:
    """The singular values of the Jacobians of hidden layers, from the input to the activation, at init_scale 1.

    {quantity: values [norm, layer]}: the largest, the median of those above 1e-4 of it, and their share.
    """
    x, depth = jnp.asarray(ds.train_x[: settings.jacobian_examples]), settings.depths[0]
    names = [None, *(f"hidden_{i}/activation" for i in range(depth))]
    found = np.full((3, len(settings.norms), max(settings.depths) + 1), np.nan)
    for i, norm in enumerate(settings.norms):
        network = common.model(settings, settings.activations[0], norm, depth)
        state = network.init(jax.random.key(settings.seeds[0]), x.shape[1:], 1.0)
        for j, pair in enumerate(itertools.pairwise(names)):
            values = np.asarray(jax.jit(lambda *s, n=network, p=pair: probes.singular_values(n, *s, x, *p))(*state))
            above = values[values > 1e-4 * values[0]]
            found[:, i, j] = values[0], np.median(above) if len(above) else np.nan, len(above) / len(values)
    return {name: (("norm", "layer"), found[i]) for i, name in enumerate(("largest", "median", "share"))}


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The change of the spread of a layer's activations with the scale."""
    checks = []
    for activation, norm in itertools.product(settings.activations, settings.norms):
        spread = results.shown_activation_spread.sel(activation=activation, norm=norm)
        ratio = (spread.max("init_scale") / spread.min("init_scale")).max("layer").values
        bound = {"below": 1 + FLAT} if norm == "batch" and spread.sizes["init_scale"] > 1 else {}
        checks.append(Check(f"{activation}, {NORM_NAMES[norm]}: largest over smallest spread", ratio, **bound))
    claim = "With BN, the spread of the activations over the batch is the same at these init_scales, in each layer."
    return [Finding(claim, "Ioffe & Szegedy 2015", checks)]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """The last hidden layer by scale; all layers of the first activation at the scale nearest 1."""
    depth, first = settings.depths[0], settings.activations[0]
    means, scale = results.mean("seed"), min(settings.shown_scales, key=lambda value: abs(math.log(value)))
    means = means.sel(depth=depth, drop=True).isel(layer=slice(0, depth))
    at_one = means.sel(activation=first, init_scale=scale, drop=True)
    title = f"{first}, {depth} hidden layers, init_scale {scale:g}, layer by layer"
    words = "Means over seeds. Saturated: |phi'| < 0.01. Dead: one value for all examples of the batch."
    spread = f"{words} Spread: root mean square over units of the standard deviation over the batch."
    jacobian = (
        "Means over seeds. J: the Jacobian from the layer's input to its activation at init_scale 1, of "
        f"{settings.jacobian_examples} examples: its largest singular value, the median of those above 1e-4 of that, "
        "and their share."
    )
    last, by_scale = means.isel(layer=-1, drop=True), ("activation", "norm", "init_scale")
    return [
        common.points("Activations of the last hidden layer", last, by_scale, RANKS, words),
        common.points(f"Signals of {title}", at_one, ("norm", "layer"), SPREADS | RANKS, spread),
        common.points(f"Gradients of {title}", at_one, ("norm", "layer"), BACKWARD, jacobian),
    ]


def draw(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Forward and backward, of the first activation and the last depth: a column of panels per norm."""
    depth, shown = settings.depths[-1], []
    rows = {
        "preactivation_spread": "forward: spread of W x\nover the batch",
        "activation_gradient": "backward: norm of the gradient\nto the layer's output phi(...)",
        "weight_gradient": "norm of the gradient\nto the layer's weights W",
    }
    one = results.sel(depth=depth, drop=True).isel(layer=slice(0, depth)).assign_coords(layer=range(1, depth + 1))
    for (name, label), norm in itertools.product(rows.items(), settings.norms):
        values = one[name].sel(norm=norm, drop=True)
        values = values.where((values > 0) & np.isfinite(values))
        lines = {f"init_scale {scale:g}": values.sel(init_scale=scale, drop=True) for scale in one.init_scale.values}
        shown.append(plots.Panel(NORM_NAMES[norm], label, lines, "hidden layer", "linear", "log"))
    title = f"{settings.activations[0]}, {depth} hidden layers of {settings.hidden_width}, at initialization"
    return plots.panels(shown, title=title, columns=len(settings.norms), share_rows=True)


CLAIM = Claim(
    name="signals",
    question="Do signals and gradients depend on the size of the initial weights, layer by layer?",
    source="",
    settings=Settings, quick=Settings(), full=common.FULL, tiny=common.TINY,
    measure=measure, judge=judge, figure=draw, tables=tables, share=2,
)  # fmt: skip
