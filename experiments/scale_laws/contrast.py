"""Does any of the laws hold without batch normalization?"""

from functools import partial

import numpy as np
import xarray as xr

import bnjax
from bnjax import activations
from bnjax.findings import Check, Finding
from experiments.scale_laws import common, networks
from experiments.scale_laws.common import Settings
from experiments.scale_laws.networks import Problem
from experiments.scale_laws.one_step import measure_laws, to_input
from experiments.scale_laws.trajectories import each_decay, trainer
from experiments.table import Table

NORMS = {"batch": "with BN", "none": "without BN"}
POWERS = ["outputs", "gradient to its input", "gradient to its W", "gradients to the other W"]
POWERS += ["gradients to all W, all scaled"]


def cosines(run, p: Problem) -> list[float]:
    """<W, dL/dW> / (|W| |dL/dW|) of each hidden layer, at epsilon 0."""
    d, found = run(p), []
    for name in p.hidden:
        W, gradient = (np.float64(params[name]["kernel"]) for params in (p.params, d.to_params))
        unit = max(np.linalg.norm(W) * np.linalg.norm(gradient), np.finfo(float).tiny)
        found.append(float((W * gradient).sum() / unit))
    return found


def powers_of_a(run, p: Problem) -> np.ndarray:
    """With which power of a norms grow: least and greatest log-log slope from a = 1/8 to 8, [POWERS, 2].

    One hidden layer is scaled, each in turn; in the last row all are. NaN where there is nothing to measure.
    """
    names, found = p.hidden, [[] for _ in POWERS]

    def norms(members, a):
        d = run(p.scaled(members, a))
        own, kernels = members[0], {name: d.to_params[name]["kernel"] for name in names}
        others = [kernels[name] for name in names if name != own]
        groups = [d.outputs], [to_input(d, own)], [kernels[own]], others, kernels.values()
        return [[np.linalg.norm(np.float64(array)) for array in group] for group in groups]

    for members, rows in [*(([name], range(4)) for name in names), (names, [4])]:
        by_a = [norms(members, a) for a in 2.0 ** np.arange(-3, 4)]
        with np.errstate(divide="ignore", invalid="ignore"):
            for i in rows:
                found[i] += [*np.diff(np.log2([of_a[i] for of_a in by_a]), axis=0).ravel()]
    usable = [slopes if slopes and np.isfinite(slopes).all() else [np.nan] for slopes in found]
    return np.array([[min(slopes), max(slopes)] for slopes in usable])


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """At epsilon 0, with batch normalization and without: powers of a, inner products; without: the laws at a = 2."""
    every = dict.fromkeys((settings.activation, "relu", "sigmoid"))
    layers = {(name, norm): networks.network(settings, name, norm) for name in every for norm in NORMS}
    programs = {names: networks.program(one) for names, one in layers.items()}
    train = trainer(layers[settings.activation, "none"], settings.batch_size)

    def one_step(p, name):
        runs = [programs[name, norm] for norm in NORMS]
        found = measure_laws(programs[name, "none"], p, [2.0])[["deviation"]].isel(factor=0, drop=True)
        found["cosine"] = ("norm", "layer"), [cosines(run, p) for run in runs]
        found["power"] = ("norm", "grows", "bound"), [powers_of_a(run, p) for run in runs]
        coords = {"norm": [*NORMS], "layer": p.hidden, "grows": POWERS, "bound": ["least", "greatest"]}
        return found.rename(deviation="without").assign_coords(coords).expand_dims(activation=[name])

    def training(p):
        recorded = np.unique([1, settings.steps])
        found = each_decay(train, p, p.hidden, [2.0], settings, recorded, normed=False).isel(factor=0, drop=True)
        names = {"trajectory": "trajectory_without", "trajectory_norm": "trajectory_without_norm"}
        return found[[*names]].rename(names | {"step": "few"})

    def jobs(p):
        return [*(partial(one_step, p, name) for name in every), partial(training, p)]

    return networks.over_seeds(settings, jobs)


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Powers of a with batch normalization and without, and how far the latter are from its laws."""
    name, others, last = settings.activation, settings.depth - 1, results.trajectory_without.isel(few=-1)
    at = results.sel(activation=name)
    powers, cosine = at.power.sel(grows=POWERS[-1]), np.abs(at.cosine)
    # phi(a x) = a phi(x): each of the other layers multiplies the gradient to W by a.
    bound = {"within": (others - 1e-3, others + 1e-3)} if name in activations.HOMOGENEOUS else {}
    grows = [Check("p with BN", powers.sel(norm="batch").values, within=(-1.001, -0.999), holds="all")]
    grows.append(Check("p without BN", powers.sel(norm="none").values, **bound, holds="all"))
    inner = [Check("|<W, dL/dW>| / |W| |dL/dW| with BN", cosine.sel(norm="batch").values, below=1e-6, holds="all")]
    inner.append(Check("without BN", cosine.sel(norm="none").values, above=1e-6, holds="all"))
    found = {f"one step, {law}": at.without.sel(law=law) for law in at.law.values}
    found |= {f"{settings.steps} steps, decay {decay}": last.sel(decay=decay) for decay in last.decay.values}
    broken = [Check(f"deviation in {words}", one.values, above=1e-3, holds="all") for words, one in found.items()]
    diverges = np.isinf(last) & np.isfinite(results.trajectory_without_norm.isel(few=-1))
    note = "Training at a = 2 diverges where that at a = 1 does not." if diverges.any() else ""
    claim = f"W -> a W in all {settings.depth} layers multiplies the gradients to W by a^p ({name})."
    return [
        Finding(claim, checks=grows),
        Finding("<W, dL/dW> is 0 with batch normalization and not without.", checks=inner),
        Finding("Without batch normalization none of the laws holds at a = 2.", checks=broken, note=note),
    ]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Powers of a, over layers and seeds."""
    columns = {words: results.power.sel(norm=norm).round(3) for norm, words in NORMS.items()}
    title = "W -> a W in one hidden layer: the power of a in a norm, a from 1/8 to 8, least .. greatest"
    return [common.table(title, ("activation", "grows"), columns)]


CLAIM = common.claim("contrast", __doc__, measure=measure, judge=judge, tables=tables)
