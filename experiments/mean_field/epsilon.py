"""The init_scale below which batch normalization's epsilon makes the signal of a deep network die."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.findings import Check, Finding
from bnjax.theory import mean_field
from experiments.claim import Claim
from experiments.mean_field import common
from experiments.settings import at_least, require, setting
from experiments.table import Table

FACTORS = (0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0, 16.0)  # of the threshold of init_scale
DYING = FACTORS.index(0.5)
BATCH_SIZE = 16
NAMES = ("relu", "tanh", "gelu", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Settings(common.Wide):
    """Of the networks with batch normalization."""

    epsilon: float = setting(1e-5, "Batch normalization's, in the part epsilon.")
    epsilon_activations: tuple[str, ...] = setting(NAMES, "Of the part epsilon.")
    epsilon_depth: int = setting(8, "Hidden layers in the part epsilon, at least 4.")

    def __post_init__(self):
        super().__post_init__()
        common.check_activations(self, "epsilon_activations")
        require(1e-12 <= self.epsilon <= 1, "epsilon", f"must be in [1e-12, 1], got {self.epsilon}")
        at_least(self, epsilon_depth=4)


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """Signal in the last layer, growth in the deep half and the threshold, activation x init_scale."""
    depth, epsilon, names = settings.epsilon_depth, settings.epsilon, settings.epsilon_activations
    middle = depth // 2
    thresholds = np.array([mean_field.init_scale_threshold(name, epsilon, BATCH_SIZE) for name in names])
    init_scales = np.array(FACTORS) * thresholds[:, None]

    def run(width, name, init_scales):
        """Variance and growth [seeds, init_scales], the threshold [seeds]."""
        model = bnjax.mlp((width,) * depth, width, name, "batch", epsilon=epsilon)

        def one(seed, init_scales, x, cotangent):
            key = jax.random.fold_in(jax.random.key(seed), width)

            def at(init_scale):
                params, stats = model.init(key, (width,), init_scale)
                squares, shown = common.squared_gradients(model, params, stats, x, cotangent)
                return jnp.stack([shown[f"hidden_{i}/norm"].var(0).mean() for i in range(depth)]), squares

            return jax.vmap(at)(init_scales)

        x = common.orthonormal(BATCH_SIZE, width)
        arguments = (jnp.asarray(init_scales, jnp.float32), x * np.float32(math.sqrt(width)), x)
        variance, squares = common.over_seeds(one, settings.epsilon_seeds, *arguments)
        # Far below the threshold V is multiplied by (init_scale / threshold)^2 in each layer.
        per_layer = (variance[:, DYING, -1] / variance[:, DYING, middle]) ** (1 / (depth - 1 - middle))
        growth = (squares[..., :-1] / squares[..., 1:])[..., middle:].mean(-1)
        return variance[..., -1], growth, init_scales[DYING] / np.sqrt(per_layer)

    def predicted(name, init_scale):
        signal = mean_field.signal_by_layer(name, depth, BATCH_SIZE, epsilon, math.sqrt(2) * init_scale)
        return signal.normalized_variance[-1], signal.growth[middle:-1].mean()

    each = list(zip(names, init_scales, strict=True))
    limits = zip(*common.limits(run, [(settings.widths, *one) for one in each], "epsilon"), strict=True)
    theory = np.array([[predicted(name, scale) for scale in scales] for name, scales in each])
    theory = {"variance": theory[..., 0], "growth": theory[..., 1], "threshold": thresholds}
    dims, columns = ("activation", "factor"), {"init_scale": init_scales}
    for (what, expected), found in zip(theory.items(), limits, strict=True):
        measured, error = np.stack(found, 1)
        columns |= {f"{what}_theory": expected, what: measured, f"{what}_error": error}
    columns = {name: (dims[: values.ndim], values) for name, values in columns.items()}
    return xr.Dataset(columns, {"activation": list(names), "factor": list(FACTORS)})


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The thresholds of networks against the theory's."""
    checks, columns = [], (results[f"threshold{end}"].values for end in ("_theory", "", "_error"))
    for name, theory, measured, error in zip(results.activation.values, *columns, strict=True):
        checks += [
            Check(f"{name}: threshold in theory", theory),
            Check(f"{name}: mean threshold of networks", measured),
            Check(f"{name}: its standard error", error),
            Check(f"{name}: mean above theory by", measured / theory - 1, unit="%", within=(-0.02, 0.02)),
        ]
    claim = "Below an init_scale that theory predicts to 2%, epsilon makes the signal of a deep network die."
    return [Finding(claim, checks=checks)]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Signal and growth below and above the thresholds."""
    around = [("", "{activation}"), ("init_scale", "{init_scale:.3g}"), ("factor", "{factor:g}")]
    around += [("variance", "{variance_theory:.3g}"), ("measured", "{variance:.3g} ± {variance_error:.1g}")]
    around += [("growth", "{growth_theory:.3f}"), ("measured", "{growth:.3f} ± {growth_error:.3f}")]
    caption = "factor: of the threshold. variance: of BN's output in the last layer. growth: per layer, of the squared "
    caption += "gradient norm in the deep half."
    title = f"Around the threshold of init_scale, epsilon {settings.epsilon:g}, batch size {BATCH_SIZE}"
    return [common.points(title, results, around, caption)]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Variance of BN's output in the last layer, and growth per layer, over init_scale in units of the threshold."""
    options = {"xlabel": "init_scale / threshold", "marks": {"threshold": 1}, "levels": {"1": 1}}

    def panel(what, label, yscale):
        return common.panel(results, label, (what, f"{what}_error", f"{what}_theory"), yscale=yscale, **options)

    variance = panel("variance", "variance of BN's output in the last layer", "log")
    growth = panel("growth", "growth of the squared gradient per layer", "linear")
    return plots.panels([variance, growth], title=f"epsilon {settings.epsilon:g}, {settings.epsilon_depth} layers")


CLAIM = Claim(
    name="epsilon",
    question="Does the signal die below the init_scale that theory predicts from epsilon?",
    source="The theory of the library: bnjax.theory.mean_field.epsilon_threshold.",
    settings=Settings, quick=Settings(), full=Settings(),
    tiny=Settings(epsilon_width=64, epsilon_seeds=tuple(range(16)), epsilon_activations=("relu",), epsilon_depth=4),
    measure=measure, judge=judge, tables=tables, figure=figure,
)  # fmt: skip
