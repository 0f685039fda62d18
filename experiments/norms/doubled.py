"""The weights' own gradient when the weights are doubled: behind each norm, in each family of networks.

A network that does not change with the size of W has a gradient |dL/dW| proportional to 1 / |W|: it halves. In a
homogeneous network without a norm the gradient of a layer is multiplied by 2 for each other layer that is doubled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import compilation, norms, plots
from bnjax.findings import Check, Finding, number, spread
from experiments.claim import Claim
from experiments.common import parse_seeds
from experiments.norms.common import FAMILIES, NAMES, check_groups, network, pooled
from experiments.settings import at_least, check_axis, require, setting
from experiments.table import Table

OF_KERNELS = ("weight", "weight_standardized")
NEAR, CHANGED = 0.01, 0.505  # a hundredth of what is expected; above it a gradient has not halved
SHOWN = ("batch", "layer", "group", "rms", "weight", "none")
TOGETHER, ALONE = "all of them doubled", "each doubled alone"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of networks without training."""

    norms: tuple[str, ...] = setting((*NAMES,), f"Of {', '.join(norms.NORMS)}.")
    families: tuple[str, ...] = setting(FAMILIES, f"Of {', '.join(FAMILIES)}.")
    doubled_layers: int = setting(3, "Hidden layers of the fully connected network; of the others, or blocks, 2.")
    doubled_width: int = setting(64, "Units in each.")
    doubled_channels: int = setting(8, "Of the first layer or block of the networks for images.")
    doubled_examples: int = setting(32, "In the batch, at least 4.")
    doubled_seeds: tuple[int, ...] = setting((0, 1, 2), "Initializations.", parse_seeds)
    pool: int = setting(2, "Images are averaged over squares of this many pixels a side for those networks.")

    def __post_init__(self):
        for field, table in (("norms", norms.NORMS), ("families", FAMILIES)):
            names = getattr(self, field)
            known = len({*names}) == len(names) > 0 and {*names} <= {*table}
            require(known, field, f"must be different ones of {', '.join(table)}, got {','.join(names)!r}")
        at_least(self, doubled_layers=2, doubled_width=1, doubled_channels=1, doubled_examples=4, pool=1)
        check_groups(self, "doubled_width", "doubled_channels")
        check_axis(self, "doubled_seeds", "seed")

    def network(self, family: str, norm: str) -> bnjax.Model:
        """Of that family, with that norm."""
        if family == "mlp":
            return network(family, norm, self.doubled_width, self.doubled_layers)
        return network(family, norm, self.doubled_channels, 2)


def ratios(model: bnjax.Model, x: jax.Array, seeds: tuple[int, ...]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Layers; their gradients' ratios and the outputs' relative changes, [layers + 1, layers] and [layers + 1] a seed.

    Row i is with the i-th hidden kernel doubled alone, the last one with all of them. The gradient is that of
    <c, outputs>, c Gaussian: the network's alone, not that of a loss which saturates.
    """
    states = [model.init(jax.random.key(seed), x.shape[1:], 1.0) for seed in seeds]
    names = [name for name, own in states[0][0].items() if "kernel" in own and name != "output"]

    @functools.partial(jax.jit, compiler_options=compilation.options())
    def run(params, stats, x, cotangent, factors):
        kernels = [factor * params[name]["kernel"] for factor, name in zip(factors, names, strict=True)]

        def loss(kernels):
            own = {name: params[name] | {"kernel": kernel} for name, kernel in zip(names, kernels, strict=True)}
            outputs, _ = model.apply(params | own, stats, x, train=True)
            return (outputs * cotangent).sum(), outputs

        gradients, outputs = jax.grad(loss, has_aux=True)(kernels)
        return jnp.stack([jnp.linalg.norm(gradient) for gradient in gradients]), outputs

    count, found, changes = len(names), [], []
    factors = np.concatenate([np.ones((1, count)), 1 + np.eye(count), 2 * np.ones((1, count))]).astype(np.float32)
    for seed, state in zip(seeds, states, strict=True):
        cotangent = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), (len(x), 10))
        each = [run(*state, x, cotangent, row) for row in factors]
        sizes, outputs = (np.asarray(part, float) for part in zip(*each, strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):  # where all units are dead there is no ratio: NaN
            found.append(sizes[1:] / sizes[:1])
            changes.append(np.linalg.norm(outputs[1:] - outputs[:1], axis=(1, 2)) / np.linalg.norm(outputs[0]))
    return names, np.stack(found), np.stack(changes)


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Of each family: (norm, layer, seed) together and alone, and the outputs' change with all doubled."""
    images, columns = pooled(ds, settings.pool).train_x[: settings.doubled_examples], {}
    coords = {"norm": list(settings.norms), "seed": list(settings.doubled_seeds)}
    for family in settings.families:
        dims = ("norm", "seed", f"{family}_layer")
        each = [ratios(settings.network(family, norm), images, settings.doubled_seeds) for norm in settings.norms]
        found, change = (np.stack([part[i] for part in each]) for i in (1, 2))
        coords[dims[-1]] = each[0][0]
        columns[f"{family}_together"] = dims, found[:, :, -1]
        columns[f"{family}_alone"] = dims, np.diagonal(found, axis1=2, axis2=3)
        columns[f"{family}_change"] = dims[:2], change[:, :, -1]
    return xr.Dataset(columns, coords)


def farthest(values: xr.DataArray) -> float:
    """The value that is farthest from 1/2; NaN if there is one."""
    flat = values.values.ravel()
    return float(flat[np.abs(flat - 0.5).argmax()])


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """All kernels doubled together, behind norms and without; each alone in residual networks."""
    half = (0.5 * (1 - NEAR), 0.5 * (1 + NEAR))
    behind = [name for name in settings.norms if name != "none"]
    findings, of_norms = [], results.sel(norm=behind)
    if behind:
        checks = [
            Check(f"{family}: ratio farthest from 1/2", farthest(of_norms[f"{family}_together"]), within=half)
            for family in settings.families
        ]
        checks += [
            Check(f"{family}: largest change of the outputs", of_norms[f"{family}_change"].values.max(), below=NEAR)
            for family in settings.families
        ]
        claim = (
            "Behind any norm, doubling all hidden weights halves their gradients and leaves the outputs as they are."
        )
        findings.append(Finding(claim, checks=checks, note=f"All of {', '.join(NAMES[name] for name in behind)}."))
    straight = [family for family in settings.families if family != "residual"]
    if "none" in settings.norms and straight:
        checks, none = [], results.sel(norm="none")
        for family in straight:
            together, alone = none[f"{family}_together"], none[f"{family}_alone"]
            others = together.sizes[f"{family}_layer"] - 1
            near = {"within": (1 - NEAR, 1 + NEAR), "holds": "all"}
            statement = f"{family}, all doubled: ratio over {2**others}"
            checks.append(Check(statement, together.values.ravel() / 2**others, **near))
            checks.append(Check(f"{family}, each alone: ratio", alone.values.ravel(), **near))
        claim = "Without a norm, gradients double for each other layer that is doubled, and not for a layer's own."
        findings.append(Finding(claim, checks=checks))
    data_norms = [name for name in behind if name not in OF_KERNELS]
    if "residual" in settings.families and data_norms:
        alone = results.residual_alone.sel(norm=data_norms)
        layers = alone.residual_layer.values
        first, second = ([name for name in layers if name.endswith(end)] for end in ("/0", "/1"))
        inside, ends = (alone.sel(residual_layer=chosen) for chosen in (first, second))
        stem = alone.sel(residual_layer="stem")
        checks = [
            Check("first product of a branch: ratio farthest from 1/2", farthest(inside), within=half),
            Check("second product of a branch: smallest ratio", ends.values.min(), above=CHANGED),
            Check("stem: smallest ratio", stem.values.min(), above=CHANGED),
            Check("second product of a branch: ratio", ends.values),
            Check("stem: ratio", stem.values),
        ]
        claim = (
            "In a residual network a norm halves the gradient of the product that it directly follows, and of no other."
        )
        findings.append(Finding(claim, checks=checks, note="Norms of activations; each kernel doubled alone."))
    return findings


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Each network."""
    rows = []
    for family in settings.families:
        for name in settings.norms:
            together, alone, change = (
                results[f"{family}_{part}"].sel(norm=name).values for part in ("together", "alone", "change")
            )
            rows.append([family, NAMES[name], spread(together), spread(alone), number(float(np.median(change)))])
    title = "Gradient of a hidden kernel after doubling over that before"
    headers = ("network", "norm", TOGETHER, ALONE, "outputs change")
    caption = "Median and range over layers and seeds. Outputs: relative change, all hidden kernels doubled."
    return [Table(title, headers, rows, caption)]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Ratios by layer."""
    shown = []
    for part, words in (("together", TOGETHER), ("alone", ALONE)):
        for family in settings.families:
            values = results[f"{family}_{part}"]
            place = values.assign_coords({f"{family}_layer": np.arange(values.sizes[f"{family}_layer"])})
            series = {NAMES[name]: place.sel(norm=name) for name in SHOWN if name in settings.norms}
            shown.append(plots.Panel(f"{family}, {words}", "|dL/dW| after over before", series, xlabel="hidden kernel",
                                     xscale="linear", yscale="log", levels={"1/2": 0.5}))  # fmt: skip
    drawn = plots.panels(shown, title="The hidden weights doubled", columns=len(settings.families))
    for axes, family in zip(drawn.axes, 2 * settings.families, strict=True):
        names = results[f"{family}_layer"].values
        axes.set_xticks(range(len(names)), names)
    return drawn


CLAIM = Claim(
    name="doubled",
    question="How do the weights' own gradients change when the weights are doubled?",
    source="van Laarhoven 2017, L2 Regularization versus Batch and Weight Normalization: behind BN, as 1 / |W|.",
    explanation="Networks with ReLU at initialization, one batch, epsilon at its default. The gradient is that of "
    "<c, outputs>, c a fixed random cotangent.",
    settings=Settings, quick=Settings(), full=Settings(doubled_seeds=tuple(range(10))),
    tiny=Settings(norms=("batch", "none"), families=("mlp", "residual"), doubled_layers=2, doubled_width=8,
                  doubled_channels=4, doubled_examples=8, doubled_seeds=(0, 1)),
    measure=measure, judge=judge, tables=tables, figure=figure, share=5,
)  # fmt: skip
