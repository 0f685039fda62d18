"""Gradients as powers of init_scale, with BN and where phi(a z) = a phi(z); other networks over all scales."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

import bnjax
from bnjax import activations, plots
from bnjax.findings import Check, Finding, number
from bnjax.theory.mean_field import gradient_growth, init_scale_threshold
from experiments.claim import Claim
from experiments.gradient_flow import common
from experiments.gradient_flow.common import ABOVE, FLAT, NORM_NAMES, Settings
from experiments.table import Table

# The gradient is that to W, to W x, to BN(W x) and to phi(...).
LABELS = {"weight": "W", "preactivation": "W x", "norm": "BN(W x)", "activation": "phi(...)"}
SATURATING = ("tanh", "sigmoid")
SMALL, MIDDLE, LARGE = 1e-2, 3, 1e2  # slopes without BN are up to SMALL, and from MIDDLE to LARGE
TOP = 1e14  # of the figure; its foot is 1 / TOP
NO_SLOPE = "No slope: there are no 2 scales at which all gradients are finite and not 0."


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """Of all networks; without BN with further seeds, as norms of saturated networks differ most between seeds."""
    last, found = max(settings.seeds) + 1, []
    for norm in settings.norms:
        more = range(last, last + settings.more_seeds) if norm == "none" else ()
        one = dataclasses.replace(settings, norms=(norm,), seeds=(*settings.seeds, *more))
        found.append(common.measure(one, ds, settings.init_scales, common.gradients(settings)))
    return xr.concat(found, "norm", data_vars="all", join="outer", fill_value=np.float32(np.nan))


def slopes(values: xr.DataArray) -> xr.DataArray:
    """The slope of log10 values against log10 init_scale by least squares; of those that are finite and not 0."""
    y = np.log10(values.where((values > 0) & np.isfinite(values)).astype(float))
    x = np.log10(values.init_scale).where(y.notnull())
    x, y = x - x.mean("init_scale"), y - y.mean("init_scale")
    return (x * y).sum("init_scale", min_count=2) / (x * x).sum("init_scale", min_count=2)


def theory(norm: str, quantity: str, depth: int) -> list[int]:
    """The powers of init_scale by layer; without BN, of an activation for which phi(a z) = a phi(z)."""
    if norm == "batch":
        return [{"weight": -1, "preactivation": -1, "norm": 0, "activation": 0}[quantity]] * depth
    return [depth - 1] * depth if quantity == "weight" else [*reversed(range(depth))]


def has_law(settings: Settings, activation: str, norm: str) -> bool:
    """True if `theory` holds: with BN outputs stay, whatever the loss; without, it must be linear in them."""
    return norm == "batch" or (activation in activations.HOMOGENEOUS and settings.loss == "cotangent")


def in_range(results: xr.Dataset, activation: str, norm: str, depth: int) -> xr.Dataset:
    """One network's hidden layers; NaN at scales at which a signal leaves float32's range."""
    one = results.sel(activation=activation, norm=norm, depth=depth, drop=True).isel(layer=slice(0, depth))
    return one.where(np.isfinite(one.activation_spread).all(["layer", "seed"]))


class Fit(NamedTuple):
    """The slopes of one network."""

    activation: str
    depth: int
    data: xr.Dataset  # at the scales at which all gradients are finite and not 0
    slopes: xr.DataArray  # [quantity, seed, layer]
    error: Check  # the largest distance from the theory, by seed

    @property
    def ends(self) -> xr.DataArray:
        """The lowest and the highest slope of the layers, means over seeds: [2, quantity]."""
        means = self.slopes.mean("seed")
        return xr.concat([means.min("layer"), means.max("layer")], "end")


def fits(results: xr.Dataset, settings: Settings, norm: str) -> list[Fit]:
    """Of the networks with that norm that have a law, and 2 scales at least."""
    found = []
    for activation, depth in itertools.product(settings.activations, settings.depths):
        if norm not in settings.norms or not has_law(settings, activation, norm):
            continue
        one = in_range(results.sel(seed=list(settings.seeds)), activation, norm, depth)
        good = ((one.weight_gradient > 0) & np.isfinite(one.weight_gradient)).all(["seed", "layer"])
        one = one.sel(init_scale=good & (one.init_scale >= common.first_scale(settings, activation, norm)))
        if one.sizes["init_scale"] > 1:
            to = [name for name in LABELS if norm == "batch" or name != "norm"]
            fitted = xr.concat([slopes(one[f"{name}_gradient"]) for name in to], "quantity").assign_coords(quantity=to)
            law = xr.DataArray([theory(norm, name, depth) for name in to], dims=("quantity", "layer"))
            error = abs(fitted - law).max(["quantity", "layer"]).values
            words = f"{activation}, {NORM_NAMES[norm]}, {depth} layers: largest error of a slope"
            found.append(Fit(activation, depth, one, fitted, Check(words, error, below=FLAT, holds="all")))
    return found


def slope_checks(name: str, fitted: list[Fit], quantity: str, power: int) -> list[Check]:
    """The lowest and the highest slope of these fits."""
    ends, within = [fit.ends.sel(quantity=quantity) for fit in fitted], (power - FLAT, power + FLAT)
    both = {"lowest": min(float(low) for low, _ in ends), "highest": max(float(high) for _, high in ends)}
    return [Check(f"{word} slope of the gradient to {name}", value, within=within) for word, value in both.items()]


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """With BN of all networks together; without, by activation."""
    found = with_norm(results, settings) if "batch" in settings.norms else []
    fitted = fits(results, settings, "none")
    for activation in settings.activations if "none" in settings.norms else ():
        checks, claim = [], f"Without BN, the gradient to the weights W of {activation} layers"
        if has_law(settings, activation, "none"):
            claim += " grows as a power of init_scale, the number of the other hidden layers."
            for fit in (fit for fit in fitted if fit.activation == activation):
                checks += [*slope_checks(f"W, {fit.depth} layers", [fit], "weight", fit.depth - 1), fit.error]
        else:
            saturates = activation in SATURATING
            claim += f" follows no power of init_scale{': it grows, then is exactly 0' * saturates}."
            bound = {"below": max(settings.init_scales), "holds": "all"} if saturates else {}
            for depth in settings.depths:
                one, name = facts(results, activation, depth, 0), f"first W of {depth} layers"
                checks += [
                    Check(f"{name}: change of the slope over all scales", one["change"], above=FLAT),
                    Check(f"{name}: norm at {one['one']:.3g}", one["at_one"]),
                    Check(f"{name}: norm at {one['largest']:.3g}, where its median is largest", one["at_largest"]),
                    Check(f"{name}: exactly 0 from init_scale", one["zero"], **bound),
                ]
        found.append(Finding(claim, checks=checks, note="" if checks else NO_SLOPE))
    return found


def with_norm(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """By scale and by depth."""
    fitted, checks, factors = fits(results, settings, "batch"), [], []
    if fitted:
        for quantity, name in {"norm": "BN's outputs", "activation": "the layers' outputs", "weight": "W"}.items():
            checks += slope_checks(name, fitted, quantity, theory("batch", quantity, 1)[0])
        decades = [np.log10(fit.data.init_scale.values[-1] / fit.data.init_scale.values[0]) for fit in fitted]
        checks += [*(fit.error for fit in fitted), Check("fewest decades of a fit", min(decades))]
        for name in settings.activations:
            threshold = init_scale_threshold(name, settings.epsilon)
            checks.append(Check(f"{name}: init_scale where epsilon matters", threshold))
    for fit in (fit for fit in fitted if fit.depth == settings.depths[-1] > 1):
        passing = fit.data.activation_gradient.astype(float)
        growth = (passing.isel(layer=0) / passing.isel(layer=-1)) ** (2 / (fit.depth - 1))  # of the squared norm
        name = f"{fit.activation}, {NORM_NAMES['batch']}, {fit.depth} layers: factor per layer"
        factors.append(Check(name, growth.median("init_scale").values, above=1))
        if settings.batch_size >= 4:
            infinite = gradient_growth(fit.activation, settings.batch_size)
            factors.append(Check(f"{fit.activation}: factor per layer, infinitely wide", infinite))
    claim = (
        "With BN, the gradients that pass from layer to layer do not depend on init_scale, and those to the weights W "
        "are inversely proportional to it: BN divides by what W multiplies with."
    )
    found = [Finding(claim, "Ioffe & Szegedy 2015", checks, "" if checks else NO_SLOPE)]
    claim = "With BN, the squared norm of the gradient still grows with depth, layer by layer towards the input."
    return [*found, Finding(claim, "Yang et al. 2019", factors)] if factors else found


def facts(results: xr.Dataset, activation: str, depth: int, layer: int) -> dict[str, Any]:
    """Without BN, how the norm of the gradient to one layer's weights goes with init_scale: by medians, or by seed."""
    norms = in_range(results, activation, "none", depth).weight_gradient.isel(layer=layer)
    norms = norms.transpose("init_scale", "seed")
    scales, median = norms.init_scale.values, norms.median("seed", skipna=False)
    lost = ~np.isfinite(median.values)
    known = median.where(~lost, -1).values

    def first(holds):
        """The smallest scale from which on it holds, as far as numbers are finite; infinity if there is none."""
        holds = np.logical_and.accumulate((holds | lost)[::-1])[::-1] & holds
        return float(scales[holds].min()) if holds.any() else math.inf

    local = np.diff(np.log(known[known > 0])) / np.diff(np.log(scales[known > 0]))
    one, largest = abs(np.log(scales)).argmin(), known.argmax()
    return {
        "small": float(slopes(median.sel(init_scale=slice(0, SMALL)))),
        "large": float(slopes(median.sel(init_scale=slice(MIDDLE, LARGE)))),
        "change": float(np.ptp(local)) if local.size else 0.0,  # of the slope, over all scales
        "one": float(scales[one]),
        "at_one": norms.values[one],
        "largest": float(scales[largest]),
        "at_largest": norms.values[largest],
        "zero": [first(zero) for zero in (norms == 0).values.T],
        "infinite": first(lost),
    }


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """The slopes of each network that has a law; all scales of those without BN."""
    laws, others = [], []
    for name, fit in ((name, fit) for norm, name in NORM_NAMES.items() for fit in fits(results, settings, norm)):
        ends = {str(one.quantity.values): map(number, (one.round(2) + 0.0).values.tolist()) for one in fit.ends.T}
        cells = (" to ".join(dict.fromkeys(ends.get(to, "-"))) for to in LABELS)
        scales = map(number, fit.data.init_scale.values[[0, -1]].tolist())
        std = number(float(fit.slopes.std("seed").max()))
        laws.append([f"{fit.activation}, {name}", str(fit.depth), *scales, *cells, std])
    without = itertools.product(settings.activations, settings.depths) if "none" in settings.norms else ()
    for activation, depth, layer in ((*one, layer) for one in without for layer in dict.fromkeys((0, one[1] - 1))):
        one = facts(results, activation, depth, layer)
        norms = (float(np.median(one[name])) for name in ("at_one", "at_largest"))
        values = (one["small"], one["large"], *norms, one["largest"], max(one["zero"]), one["infinite"])
        cells = (number(value) if math.isfinite(value) else "-" for value in values)
        others.append([activation, f"{layer + 1} of {depth}", *cells])
    law = (
        "Of hidden layers the lowest to the highest, means over seeds; their largest standard deviation over seeds. "
        f"Theory: with BN -1, -1, 0, 0, from {ABOVE} times the scale where epsilon matters; without, of L layers "
        "L - 1 to W, and L - 1 (first layer) to 0 (last) to W x and phi(...)."
    )
    no_law = (
        f"Medians over {results.sizes['seed']} seeds. Slopes of the norm's logarithm against that of init_scale. 0: "
        "exactly 0 in float32 for all seeds from that scale upward, though all signals are finite. Not finite: beyond "
        "float32's range."
    )
    slope = (f"slope to {SMALL:g}", f"{MIDDLE:g} to {LARGE:g}")
    columns = ["network", "layer", *slope, "at 1", "largest", "at scale", "0 from", "not finite from"]
    heads = ["network", "layers", "from", "until", *(f"to {label}" for label in LABELS.values()), "std"]
    both = (
        Table("Slopes of log |gradient| against log init_scale", heads, laws, law),
        Table("Without BN: the norm of the gradient to one layer's weights W", columns, others, no_law),
    )
    return [table for table in both if table.rows]


def draw(results: xr.Dataset, settings: Settings) -> plots.Figure | None:
    """The gradient to the first and last hidden layer's weights; points: it is 0 for all seeds."""
    depth, shown = settings.depths[-1], []
    for activation in settings.activations:
        series, theories, zeros = {}, {}, {}
        for norm in settings.norms:
            norms = in_range(results.sel(seed=list(settings.seeds)), activation, norm, depth).weight_gradient
            norms = norms.where((norms == 0) | ((norms > 1 / TOP) & (norms < TOP)))
            first, last = (norms.isel(layer=i, drop=True) for i in (0, -1))
            series |= {f"{NORM_NAMES[norm]}, {name} layer": line for name, line in (("first", first), ("last", last))}
            start = first.median("seed").sel(init_scale=1, method="nearest")
            if has_law(settings, activation, norm) and start > 0:
                slope = theory(norm, "weight", depth)[0]
                line = 4 * float(start) * (first.init_scale / start.init_scale.item()) ** slope
                theories[f"theory, {NORM_NAMES[norm]}"] = line.where((line > 1 / TOP) & (line < TOP))
            if (zero := (first == 0).all("seed")).any():
                zeros[f"{NORM_NAMES[norm]}, first layer: exactly 0"] = xr.where(zero, 1 / TOP, np.nan)
        lines = {name: line.where(line > 0) for name, line in (series | theories | zeros).items()}
        begin = max(common.first_scale(settings, activation, norm) for norm in settings.norms)
        marks = {"BN's slope from here": begin} if begin else {}
        options = {"yscale": "log", "marks": marks, "theory": (*theories,), "unconnected": (*zeros,)}
        shown.append(plots.Panel(activation, "norm of the gradient to the weights", lines, **options))
    title = f"{depth} hidden layers of {settings.hidden_width}, at initialization"
    return plots.panels(shown, title=title, share_rows=True)


CLAIM = Claim(
    name="slopes",
    question="Do the gradients at initialization depend on the size of the weights?",
    source="Ioffe & Szegedy 2015, section 3.3: BN(a W x) = BN(W x), and its derivatives.",
    explanation="Where nearly all units are saturated, a few units in a few examples carry the gradient. Its norm then "
    "differs by powers of ten between seeds; and since such networks amplify rounding, it differs in all digits "
    "between processors. Units of tanh round to 1 at another scale on processors without fused multiply-add.",
    settings=Settings, quick=Settings(), full=common.FULL, tiny=common.TINY,
    measure=measure, judge=judge, figure=draw, tables=tables, share=4,
)  # fmt: skip
