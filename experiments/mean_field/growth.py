"""Growth of gradients in networks with batch normalization at epsilon 0, by activation and batch size."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import activations, batch_norm, plots
from bnjax.findings import Check, Finding
from bnjax.theory import mean_field
from experiments.claim import Claim
from experiments.common import parse_seeds
from experiments.mean_field import common
from experiments.settings import at_least, require, setting
from experiments.table import Table

SMALLEST_WITH_VARIANCE = 6  # batch size; below it the squared gradient has no finite variance
THEORY_SIZES = (4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
NAMES = ("relu", "elu", "gelu", "softplus", "sigmoid", "tanh", "linear")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the networks."""

    activations: tuple[str, ...] = setting(NAMES, f"Of the part growth: {', '.join(activations.ACTIVATIONS)}.")
    batch_sizes: tuple[int, ...] = setting((4, 5, 6, 8, 12, 16, 24, 32, 64), "Of the part growth, at least 4 each.")
    depth: int = setting(3, "Hidden layers in the part growth, at least 2.")
    width: int = setting(64, "Smallest of the part growth, at least 4 times the batch size; the next is twice that.")
    num_widths: int = setting(2, "Widths in the part growth, at least 2.")
    seeds: tuple[int, ...] = setting(
        tuple(range(2048)), "Networks of the part growth; above width 64 or batch size 16 the first.", parse_seeds
    )

    def __post_init__(self):
        common.check_activations(self, "activations")
        sizes = ",".join(map(str, self.batch_sizes))
        why = "at 3 or below the expected squared gradient is infinite (Theorem 8 of Yang et al. 2019 needs B >= 4)"
        allowed = all(4 <= size <= 4096 for size in self.batch_sizes)
        require(allowed, "batch_sizes", f"takes integers from 4 to 4096, got {sizes!r}: {why}")
        at_least(self, depth=2, width=16, num_widths=2)
        common.check_seeds(self, "seeds")

    def widths(self, batch_size: int) -> list[int]:
        """Of which the limit is taken; the largest alone where there is no variance."""
        widths = [max(self.width, 4 * batch_size) * 2**i for i in range(self.num_widths)]
        return widths if batch_size >= SMALLEST_WITH_VARIANCE else widths[-1:]


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """Theory and measurement, activation x batch size."""
    depth, names, sizes = settings.depth, settings.activations, settings.batch_sizes

    def run(width, batch_size):
        """Growth per layer [seeds, activations], the mean over neighbouring layers."""
        models = [bnjax.mlp((width,) * depth, width, name, "batch", epsilon=0.0) for name in names]

        def one(seed, cotangent):
            key = functools.reduce(jax.random.fold_in, (batch_size, width), jax.random.key(seed))
            params, stats = models[0].init(key, (width,), 1.0)
            below = jax.random.normal(jax.random.fold_in(key, depth + 1), (batch_size, width))
            below = batch_norm.normalize(below, 0.0)
            found = []
            for name, model in zip(names, models, strict=True):
                squares, _ = common.squared_gradients(model, params, stats, activations.get(name)(below), cotangent)
                found.append((squares[:-1] / squares[1:]).mean())
            return jnp.stack(found)

        count = max(16, math.ceil(len(settings.seeds) * 64 / width * min(1, 16 / batch_size)))
        return common.over_seeds(one, settings.seeds[:count], common.orthonormal(batch_size, width))

    def predicted(sizes):
        return np.array([[mean_field.gradient_growth(name, B) for B in sizes] for name in names])

    limits = common.limits(run, [(settings.widths(B), B) for B in sizes], "growth")
    measured, error = np.stack(limits, -1)
    columns = {"theory": predicted(sizes), "measured": measured, "error": error}
    columns = {name: (("activation", "batch_size"), values) for name, values in columns.items()}
    columns["theory_curve"] = ("activation", "theory_batch_size"), predicted(THEORY_SIZES)
    columns["theory_infinite_batch"] = "activation", predicted([None])[:, 0]
    coords = {"activation": list(names), "batch_size": list(sizes), "theory_batch_size": list(THEORY_SIZES)}
    results = xr.Dataset(columns, coords)
    z = (results.measured - results.theory) / results.error
    return results.assign(z=z.where(results.batch_size >= SMALLEST_WITH_VARIANCE))


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The theory's growth; and how far the networks are from it."""
    some = results.sel(batch_size=results.batch_size >= SMALLEST_WITH_VARIANCE)
    smallest = (some if some.batch_size.size else results).isel(batch_size=0)
    checks, infinite = [], {one.activation.item(): float(one) for one in results.theory_infinite_batch}
    for name, growth in infinite.items():
        finite = float(smallest.theory.sel(activation=name))
        checks.append(Check(f"{name}, infinite batch", growth, above=1))
        checks.append(Check(f"{name}, {int(smallest.batch_size)} examples", finite, above=growth))
    fastest = max(infinite, key=infinite.get)
    layers = mean_field.depth_at_ratio(infinite[fastest], 1e6)
    checks.append(Check(f"{fastest}, infinite batch: a factor of a million takes", layers, unit="layers"))
    claim = "In theory the squared gradient grows by E phi'^2 / Var phi >= 1 per layer, in finite batches by more."
    findings = [Finding(claim, checks=checks)]
    if some.batch_size.size:
        findings.append(common.agreement("Wide networks agree with the theory.", some.z))
    return findings


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Theory, measurement and deviation for each activation and batch size."""
    columns = [("activation", "{activation}"), ("batch size", "{batch_size}"), ("theory", "{theory:.4f}")]
    columns += [("measured", "{measured:.4f} ± {error:.4f}"), ("z", "{z:+.1f}")]
    caption = (
        "z: measured - theory in standard errors; nan: a median, which has none. One batch size, the same weights."
    )
    title = "Growth per layer of the squared gradient norm at epsilon 0"
    return [common.points(title, results.drop_dims("theory_batch_size"), columns, caption)]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """The growth over the batch size; and the deviation from theory in standard errors."""
    above_1 = results.assign(measured=results.measured - 1, theory_curve=results.theory_curve - 1)
    label, names = "growth of the squared gradient per layer, minus 1", ("measured", "error", "theory_curve")
    z = {name: results.z.sel(activation=name, drop=True) for name in results.activation.values}
    options = {"xlabel": "batch size", "xscale": "linear", "unconnected": z, "levels": {"4": 4, "-4": -4}}
    deviation = plots.Panel("deviation from theory", "standard errors", z, **options)
    growth = common.panel(above_1, label, names, xlabel="batch size (medians below 6)", yscale="log")
    return plots.panels([growth, deviation])


CLAIM = Claim(
    name="growth",
    question="Do gradients grow from layer to layer in networks with batch normalization, and as theory predicts?",
    source="Yang et al. 2019, A Mean Field Theory of Batch Normalization.",
    explanation="Inputs are drawn as if they came from a layer below, phi(BN(Gaussian)), so that the first layer is at "
    "the fixed point. The activations share their weights at each batch size, so that the z of one batch size are not "
    "independent; at batch sizes 6 to 9 the squared gradient has a variance but no fourth moment, so that its standard "
    "error is heavy-tailed.",
    settings=Settings, quick=Settings(),
    full=Settings(activations=tuple(activations.ACTIVATIONS), num_widths=3, seeds=tuple(range(8192))),
    tiny=Settings(activations=("relu",), batch_sizes=(8,), depth=2, width=16, seeds=tuple(range(64))),
    measure=measure, judge=judge, tables=tables, figure=figure, must_hold=True, share=4,
)  # fmt: skip
