"""The deviation from the laws for factors that are rounded, and its growth over training."""

import itertools
from functools import partial

import jax
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.analysis import curves
from bnjax.findings import Check, Finding
from experiments.scale_laws import common, networks
from experiments.scale_laws.common import KINKED, Settings, by_seed
from experiments.scale_laws.one_step import measure_laws, rounding_errors
from experiments.scale_laws.trajectories import MOMENTUM, each_decay, trainer
from experiments.table import Table

ROUNDINGS = 4  # allowed: two float32 evaluations differ by sqrt 2 times the error of one, measured 1.1 to 2


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """One step at each epsilon; step by step, all hidden layers, at epsilon 0, and for a = 3 in float64."""
    fixed = {name: networks.network(settings, name) for name in (settings.activation, "tanh")}  # tanh has no kink
    layers = fixed[settings.activation], networks.network(settings, epsilon=None)  # at epsilon 0, and above
    runs = [*map(networks.program, layers)]
    trainers = {name: trainer(one, settings.batch_size) for name, one in fixed.items()}
    recorded = np.unique(np.linspace(1, settings.steps, min(settings.steps, 300)).round().astype(int))

    def one_step(p, value):
        run, p = runs[value > 0], p.at(value)
        found = measure_laws(run, p, settings.factors).rename(deviation="other")
        return found.assign(rounding=("law", rounding_errors(run, p))).expand_dims(epsilon=[value])

    def training(p, name):
        def run(p, factors):
            return each_decay(trainers[name], p, p.hidden, factors, settings, recorded)

        found = run(p, settings.factors)
        with jax.enable_x64(True):
            found["trajectory_float64"] = run(p.cast(np.float64), [3.0]).trajectory.isel(factor=0, drop=True)
        crossed = found.trajectory_crossed.any("factor") & (name in KINKED)
        grown = [growth(found.trajectory.sel(decay=decay), crossed.sel(decay=decay)) for decay in found.decay]
        return found.merge(xr.concat(grown, "decay")).expand_dims(trained=[name])

    def jobs(p):
        trained = [partial(training, p, name) for name in fixed]
        return trained + [partial(one_step, p, value) for value in (0.0, *settings.epsilon)]

    return networks.over_seeds(settings, jobs)


def growth(deviations: xr.DataArray, crossed: xr.DataArray) -> xr.Dataset:
    """The growth of deviations while they are below 1e-2 and no sample has crossed a kink, and where one does first.

    Args:
      deviations: [factor, step].
      crossed: [step] True where a sample is on two sides of a kink.

    Returns:
      [factor] `step_power`, or `steps_to_e`, to grow by e: whichever law fits the last two thirds of these steps
      better; NaN if there are too few. `fit_start`, `fit_end`: of these steps. `kink_step`: where a sample crosses
      first; the deviations `kink_before` and `kink_at` it.
    """
    steps, ended = deviations.step.values, ((deviations > 1e-2).any("factor") | crossed).values
    count = int(np.argmax(ended)) if ended.any() else len(steps)
    inside = np.flatnonzero(steps[:count] > steps[max(count - 1, 0)] / 3)
    found = dict.fromkeys(("fit_start", "fit_end", "kink_step", "kink_before", "kink_at"), np.nan)
    law = curves.Growth(*np.full((2, len(deviations)), np.nan))
    if len(inside) >= 8:
        law = curves.growth(deviations.values[:, inside], steps[inside])
        found |= {"fit_start": steps[inside[0]], "fit_end": steps[inside[-1]]}
    if crossed.any():
        i = int(np.argmax(crossed.values))
        before, at = (deviations.isel(step=j).max().item() for j in (max(i - 1, 0), i))
        found |= {"kink_step": steps[i], "kink_before": before, "kink_at": at}
    return xr.Dataset(found | {"step_power": ("factor", law.power), "steps_to_e": ("factor", law.time_to_e)})


def uncrossed(results: xr.Dataset, settings: Settings) -> xr.DataArray:
    """The deviations for other a, but for those where a sample crossed a kink of the activation."""
    return results.other if settings.activation not in KINKED else results.other.where(results.crossed == 0)


def allowed(results: xr.Dataset) -> xr.DataArray:
    """After one training step: W is rounded in a W and in the sum with the update, which has its own error."""
    return ROUNDINGS * (2.0**-24 + results.trajectory_first_step * results.rounding.max(("epsilon", "law")))


def rows_of(results: xr.Dataset):
    """(network and decay in words, its part of the results), for each."""
    for name, decay in itertools.product(results.trained.values, results.decay.values):
        yield f"{name}, decay {decay}", results.sel(trained=name, decay=decay)


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """One step against the rounding of one evaluation; the growth over training."""
    ratio = by_seed(uncrossed(results, settings) / results.rounding)
    ratio = ratio[~np.isnan(ratio)]
    one_step, first, grown = [], [], []
    if len(ratio):
        one_step.append(Check("deviation over what one evaluation rounds", ratio, below=ROUNDINGS, holds="all"))
    for words, at in rows_of(results.assign(allowed=allowed(results))):
        start, end = (by_seed(at.trajectory.isel(step=i)) for i in (0, -1))
        first.append(Check(f"{words}: deviation", start, below=float(at.allowed.min()), holds="all"))
        grown.append(Check(f"{words}: deviation after {settings.steps} steps", end))
        if settings.steps > 1:
            grown.append(Check(f"{words}: over that after 1 step", end / start, above=10, holds="all"))
    where = "but for samples that cross a kink" if settings.activation in KINKED else "of all samples"
    note = "" if one_step else "Samples cross a kink in every case, so that one step shows no rounding alone."
    return [
        Finding(f"For other a, one evaluation differs by rounding alone ({where}).", checks=one_step, note=note),
        Finding("So does one step of training.", checks=first),
        Finding("Training amplifies that (how fast depends on seed and processor).", checks=grown),
    ]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """The largest deviations, by law and epsilon; growth over training."""
    alone, last = uncrossed(results, settings), results.isel(step=-1)
    across = results.other.where(results.other != alone)
    largest = {"largest": alone, f"{ROUNDINGS} roundings": ROUNDINGS * results.rounding, "across a kink": across}
    largest = {name: values.max({"scaled", "factor"} & {*values.dims}) for name, values in largest.items()}
    ends = {"1 step": results.trajectory.isel(step=0), "allowed": allowed(results), "last step": last.trajectory}
    ends |= {"in float64": last.trajectory_float64, "|W|": last.trajectory_norm}
    how = {"t^p, p": "step_power", "by e in": "steps_to_e", "from": "fit_start", "to": "fit_end"}
    how |= {"kink at": "kink_step", "before": "kink_before", "then": "kink_at"}
    title = "Deviation of W(t) / a from W(t) at a = 1 over training, a no power of two"
    caption = f"|W|: over its start. Ranges are over a and over {len(settings.seeds)} seeds."
    return [
        common.table("Deviation from the laws in one step, a no power of two", ("law", "epsilon"), largest),
        common.table(title, ("trained", "decay"), ends, caption),
        common.table("How it grows in step t", ("trained", "decay"), {name: results[of] for name, of in how.items()}),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Deviations over training, a panel for each network."""
    shown, some = [], np.unique(np.geomspace(1, results.sizes["step"], 30).round().astype(int)) - 1
    for words, at in rows_of(results.isel(step=some)):
        lines = {f"a = {a:.4g}": at.trajectory.sel(factor=a) for a in at.factor.values}
        lines["a = 3 in float64"] = at.trajectory_float64
        shown.append(plots.Panel(words, "deviation of W(t) / a", lines, xlabel="training step t", yscale="log"))
    title = f"W → aW in {settings.depth} layers of {settings.width} with BN; SGD, learning rate "
    title += f"{settings.learning_rate:g} a², momentum {MOMENTUM:g}, batch {settings.batch_size}"
    return plots.panels(shown, title=title, columns=2)


CLAIM = common.claim("rounding", __doc__, measure=measure, judge=judge, figure=figure, share=3, tables=tables)
