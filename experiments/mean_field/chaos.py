"""Growth of gradients in networks without normalization: chi_1."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax.findings import Finding
from bnjax.theory import order_chaos
from experiments.claim import Claim
from experiments.mean_field import common
from experiments.table import Table

WEIGHT_STDS = {"relu": (1.0, math.sqrt(2), 2.0), "tanh": (0.8, 1.5, 2.5), "sigmoid": (1.0, 4.0, 12.0)}
DEPTH = 5


def measure(settings: common.Wide, ds: bnjax.Dataset | None) -> xr.Dataset:
    """chi_1 in theory and measured, one case per activation and weight_std."""
    seeds = [4 * seed + i for seed in settings.epsilon_seeds for i in range(4)]
    theory = {name: [order_chaos.order_chaos(name, std) for std in stds] for name, stds in WEIGHT_STDS.items()}

    def run(width, name):
        """Growth per layer [seeds, weight_stds] of the squared gradient norm."""
        model = bnjax.mlp((width,) * DEPTH, width, name, "none", initializer="lecun_normal")
        # Inputs at the fixed point; 1e-6 is near a fixed point of 0, and chi_1 of ReLU is the same for all sizes.
        sizes = [1.0 if math.isinf(fixed.variance) else max(fixed.variance, 1e-6) for fixed in theory[name]]
        sizes = np.array(sizes) / np.array(WEIGHT_STDS[name]) ** 2

        def one(seed, weight_stds, sizes, x):
            def at(pair):
                weight_std, size = pair
                key = jax.random.fold_in(jax.random.key(seed), width)
                params, stats = model.init(key, (width,), weight_std)
                squares, _ = common.squared_gradients(model, params, stats, x * jnp.sqrt(size * width), x)
                return (squares[1:-1] / squares[2:]).mean()

            return jax.vmap(at)((weight_stds, sizes))

        arguments = (jnp.asarray(values, jnp.float32) for values in (WEIGHT_STDS[name], sizes))
        return common.over_seeds(one, seeds, *arguments, common.orthonormal(8, width))

    limits = common.limits(run, [(settings.widths, name) for name in theory], "chaos")
    cases = [(name, std) for name, stds in WEIGHT_STDS.items() for std in stds]
    fixed = [(one.phase, one.chi_1, one.xi_grad) for found in theory.values() for one in found]
    names = "activation", "weight_std", "phase", "theory", "xi_grad", "measured", "error"
    columns = zip(*cases, strict=True), zip(*fixed, strict=True), np.concatenate(limits, -1)
    columns = dict(zip(names, map(list, itertools.chain(*columns)), strict=True))
    results = xr.Dataset({name: ("case", values) for name, values in columns.items()})
    return results.assign(z=(results.measured - results.theory) / results.error)


def judge(results: xr.Dataset, settings: common.Wide) -> list[Finding]:
    """The distance of the networks from the theory."""
    claim = "Without batch normalization the squared gradient of wide networks grows by chi_1 per layer."
    return [common.agreement(claim, results.z)]


def tables(results: xr.Dataset, settings: common.Wide) -> list[Table]:
    """Theory, measurement, phase."""
    columns = [("activation", "{activation}"), ("weight_std", "{weight_std:.4g}"), ("phase", "{phase}")]
    columns += [("theory", "{theory:.4f}"), ("measured", "{measured:.4f} ± {error:.4f}"), ("z", "{z:+.1f}")]
    columns += [("layers per factor e", "{xi_grad:.3g}")]
    return [
        common.points("Without batch normalization: chi_1, growth per layer of the squared gradient", results, columns)
    ]


CLAIM = Claim(
    name="chaos",
    question="Do gradients grow by chi_1 per layer in networks without batch normalization?",
    source="Poole et al. 2016, Schoenholz et al. 2017.",
    settings=common.Wide, quick=common.Wide(), full=common.Wide(),
    tiny=common.Wide(epsilon_width=64, epsilon_seeds=tuple(range(16))),
    measure=measure, judge=judge, tables=tables, must_hold=True, share=0.3,
)  # fmt: skip
