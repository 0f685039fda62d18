"""Do the scale laws hold bit for bit where a factor is not rounded, in one step and over training?"""

from functools import partial

import numpy as np
import xarray as xr

import bnjax
from bnjax.findings import Check, Finding
from experiments.scale_laws import common, networks
from experiments.scale_laws.common import Settings, by_seed
from experiments.scale_laws.one_step import measure_laws, scaled_sets
from experiments.scale_laws.trajectories import each_decay, trainer
from experiments.table import Table

EXACT = "power_of_two", "trajectory_power_of_two"  # results that should be 0


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """All deviations under (W -> a W, epsilon -> a^2 epsilon), a = 2^k; over training for ten a up to |k| = K."""
    K, sets = settings.exponent, scaled_sets(settings.hidden)
    exponents = np.arange(-K, K + 1)
    sampled = np.unique([sign * k for k in (1, K // 4, K // 2, 3 * K // 4, K) for sign in (-1, 1) if k])
    layers = networks.network(settings), networks.network(settings, epsilon=None)  # at epsilon 0, and above
    runs, trainers = [*map(networks.program, layers)], [trainer(one, settings.batch_size) for one in layers]

    def one_step(p, value):
        found = measure_laws(runs[value > 0], p.at(value), 2.0**exponents).drop_vars("crossed")
        found = found.rename(deviation=EXACT[0], factor="exponent").assign_coords(exponent=exponents)
        return found.expand_dims(epsilon=[value])

    def training(p, value, which):
        recorded = np.unique([1, settings.steps])
        found = each_decay(trainers[value > 0], p.at(value), sets[which], 2.0**sampled, settings, recorded)
        found = found[["trajectory"]].max("step", skipna=False).rename(trajectory=EXACT[1], factor="sampled_exponent")
        return found.assign_coords(sampled_exponent=sampled).expand_dims(epsilon=[value], scaled=[which])

    def jobs(p):
        *each, whole = sets
        # Neighbours are other programs, so that they are compiled side by side.
        trained = [(value, whole) for value in (0.0, *settings.epsilon)] + [(0.0, name) for name in each]
        every = [partial(one_step, p, value) for value in (0.0, *settings.epsilon)]
        return every + [partial(training, p, *of) for of in trained]

    return networks.over_seeds(settings, jobs)


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The number of deviations, and of those that are not 0; the place of the first of them."""
    wrong = {name: (results[name] != 0) & results[name].notnull() for name in EXACT}
    notes = []
    for name, one in wrong.items():
        for index in np.argwhere(one.values)[:1]:
            where = ", ".join(f"{dim} {one[dim].values[i]}" for dim, i in zip(one.dims, index, strict=True))
            notes.append(f"{int(one.sum())} of {name} are not 0, the first at {where}.")
    measured = sum(by_seed(results[name].notnull(), "sum") for name in EXACT)
    not_zero = sum(by_seed(one, "sum") for one in wrong.values())
    checks = [
        Check("deviations measured, of each seed", measured, above=1, holds="all"),
        Check("deviations that are not exactly 0", not_zero, within=(0, 0), holds="all"),
    ]
    claim = "For a = 2^k every law holds bitwise: the size of W in front of batch normalization is invisible forward "
    claim += "and to all layers below; its own gradient only shrinks by 1 / a."
    return [Finding(claim, checks=checks, note=" ".join(notes))]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """The deviations and where float32 has normal numbers, by law and epsilon."""
    caption = f"{settings.activation}, {settings.depth} hidden layers, each scaled alone and all at once. W is "
    caption += "multiplied by a, epsilon by a^2. k: where float32 has normal numbers."
    shown = []
    for row, name, k in zip(("law", "decay"), EXACT, ("exponent", "sampled_exponent"), strict=True):
        title = "one step" if row == "law" else f"W / a after {settings.steps} steps of training"
        columns = {"k": results[k].where(results[name].notnull()), "|found - law| / |law|": results[name]}
        shown.append(common.table(f"a = 2^k, {title}", (row, "epsilon"), columns, caption))
    return shown


CLAIM = common.claim("laws", __doc__, measure=measure, judge=judge, must_hold=True, share=6, tables=tables)
