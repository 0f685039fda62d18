"""Growth of gradients per layer behind each norm, predicted and measured; and deep networks that train with it or not.

The theory is each norm's own, `bnjax.types.Norm.growth`. Its networks are infinitely wide, of layer and RMS
normalization too: they are compared with the limit of the measurements in 1 / width.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import activations, norms, plots
from bnjax.analysis import robustness
from bnjax.findings import Check, Finding, number
from bnjax.norms.weight_standardized import gain_of
from bnjax.theory import lp_norms, mean_field, order_chaos, quadrature
from bnjax.types import Norm
from experiments.claim import Claim
from experiments.common import parse_seeds
from experiments.mean_field import common as wide
from experiments.norms.common import GROUP_SIZE, NAMES, pooled
from experiments.settings import at_least, check_axis, require, setting
from experiments.table import Table

HE = math.sqrt(2)  # weight_std of the weights
POWERS = {"l1": 1, "linf": math.inf}
OVER_BATCH = ("batch", *POWERS)
MEAN_REMOVED = (*OVER_BATCH, "weight_standardized")  # of each feature, over the data
RIVAL = 64  # batch size of BN with which GroupNorm of any size is compared, too
EXAMPLES = 16  # where the norm is not over the batch
FEWEST = 8  # normalized together; with fewer the squared gradient is heavy-tailed
KEPT = 3  # decades by which the squared gradient of a trainable network may move
LEARNS, CHANCE = 0.3, 0.1  # test accuracy
POOL = 2  # pixels a side
DEEP = "sigmoid"  # activation of the trained networks


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of wide networks without training, and of a deep one that is trained."""

    norms: tuple[str, ...] = setting((*NAMES,), f"Of {', '.join(norms.NORMS)}.")
    activations: tuple[str, ...] = setting(("relu", "tanh", "sigmoid"), "Of the wide networks.")
    batch_sizes: tuple[int, ...] = setting((16, 32), f"Of BN in the wide networks, at least {FEWEST} each.")
    lp_batch_sizes: tuple[int, ...] = setting((32,), f"Of l1 and l-infinity norms there, at least {FEWEST} each.")
    group_sizes: tuple[int, ...] = setting((8, 16, 32), f"Of GroupNorm there, at least {FEWEST} each.")
    wide_depth: int = setting(2, "Hidden layers of the wide networks, at least 2.")
    wide_width: int = setting(64, "Smallest width, at least 4 times what is normalized together; the next is twice it.")
    wide_seeds: tuple[int, ...] = setting(tuple(range(1024)), "Wide networks; above width 64 the first.", parse_seeds)
    deep_layers: int = setting(30, "Hidden layers of the trained networks, at least 2.")
    deep_width: int = setting(64, f"Units in each, a multiple of {GROUP_SIZE}, at least 16.")
    deep_rates: tuple[float, ...] = setting((0.01, 0.1, 1.0), "Learning rates of the trained networks.")
    deep_seeds: tuple[int, ...] = setting((0, 1, 2), "Seeds of the trained networks.", parse_seeds)
    deep_steps: int = setting(150, "Optimizer steps of the trained networks.")
    deep_batch_size: int = setting(64, f"Examples per step of the trained networks, at least {FEWEST}.")

    def __post_init__(self):
        known = len({*self.norms}) == len(self.norms) > 0 and {*self.norms} <= {*NAMES}
        require(known, "norms", f"must be different ones of {', '.join(NAMES)}, got {','.join(self.norms)!r}")
        wide.check_activations(self, "activations")
        for field in ("batch_sizes", "lp_batch_sizes", "group_sizes"):
            sizes = getattr(self, field)
            allowed = len(sizes) > 0 and all(FEWEST <= size <= lp_norms.LARGEST_BATCH for size in sizes)
            require(allowed, field, f"takes integers from {FEWEST} to {lp_norms.LARGEST_BATCH}, got {sizes}")
        at_least(self, wide_depth=2, wide_width=16, deep_layers=2, deep_width=16, deep_steps=1, deep_batch_size=FEWEST)
        multiple = self.deep_width % GROUP_SIZE == 0
        require(multiple, "deep_width", f"must be a multiple of {GROUP_SIZE}, got {self.deep_width}")
        wide.check_seeds(self, "wide_seeds")
        check_axis(self, "deep_rates", "learning_rate")
        check_axis(self, "deep_seeds", "seed")

    @property
    def jobs(self) -> list[tuple[list[int], list[tuple[str, int]]]]:
        """(widths, points) of networks that are measured together, with the same weights; a point is (norm, size)."""
        sizes = {"batch": self.batch_sizes, "group": self.group_sizes, **dict.fromkeys(POWERS, self.lp_batch_sizes)}
        found: dict[int, list[tuple[str, int]]] = {}
        for name in self.norms:
            for size in sizes.get(name, (0,)):
                found.setdefault(max(self.wide_width, 4 * size), []).append((name, size))
        return [([width, 2 * width], points) for width, points in found.items()]

    @property
    def deep_sizes(self) -> dict[str, int]:
        """{norm: how many are normalized together in the trained networks}, 0 where there is no such number."""
        sizes = dict.fromkeys(OVER_BATCH, self.deep_batch_size) | dict.fromkeys(("layer", "rms"), self.deep_width)
        return {name: (sizes | {"group": GROUP_SIZE}).get(name, 0) for name in self.norms}


def norm_of(name: str, size: int, activation: str, **options: float) -> Norm:
    """The norm; where weights are standardized, it is with the gain of the activation."""
    own = {"group": {"group_size": size}, "weight_standardized": {"gain": activation}}
    return norms.get(name, **own.get(name, {}), **options)


def theory(name: str, size: int, activation: str) -> tuple[float, float]:
    """Growth per layer, and its standard error where it is sampled; size 0 is infinite, or none."""
    if name == "none":
        return mean_field.gradient_growth(activation, norm="none", weight_std=HE), 0.0
    sizes = {"batch_size" if name in OVER_BATCH else "num_features": size} if size else {}
    found = norm_of(name, size, activation).growth(activation, **sizes)
    if name not in POWERS:
        return found, 0.0
    scale = 1 / lp_norms.gaussian_spread(POWERS[name], size)
    return found, lp_norms.lp(activation, POWERS[name], size, scale=scale).error


def inputs(norm: Norm, activation: str) -> Callable[[jax.Array], jax.Array]:
    """Gaussian pre-activations [N, C] -> what the next layer of a deep network gets."""
    phi, name = activations.get(activation), norm.config["norm"]
    if norm.apply is not None:
        return lambda z: phi(norm.apply(*norm.init((1, z.shape[-1])), z, train=True)[0])
    gain = {"none": HE, "weight": 1.0}.get(name) or gain_of(activation)
    centered = name == "weight_standardized"
    _, q, _ = order_chaos.length_fixed_point(quadrature.function(activation), gain**2, 0.0, centered=centered)
    return lambda z: phi(math.sqrt(q) * z)


def measure_wide(settings: Settings) -> xr.Dataset:
    """Theory and measurement, (point, activation)."""

    def run(width, points):
        """Growth per layer [seeds, points, activations], the mean over neighbouring layers."""
        shape, networks = (width,) * settings.wide_depth, []
        plain = bnjax.mlp(shape, width, norm="none", use_bias=False)
        for name, size in points:
            for activation in settings.activations:
                norm = norm_of(name, size, activation, **({} if name == "weight" else {"epsilon": 0.0}))
                model = bnjax.mlp(shape, width, activation, norm, use_bias=False)
                state = model.init(jax.random.key(0), (width,), 1.0)
                examples = size if name in OVER_BATCH else EXAMPLES
                networks.append((model, state, inputs(norm, activation), examples))

        def one(seed, cotangents):
            key, found = jax.random.fold_in(jax.random.key(seed), width), []
            drawn, _ = plain.init(key, (width,), 1.0)  # once for all: drawing takes most of the compile time
            for model, (params, stats), below, examples in networks:
                z = jax.random.normal(jax.random.fold_in(key, settings.wide_depth + 1), (examples, width))
                params = {layer: own | drawn[layer] for layer, own in params.items()}
                squares, _ = wide.squared_gradients(model, params, stats, below(z), cotangents[examples])
                found.append((squares[:-1] / squares[1:]).mean())
            return jnp.stack(found).reshape(len(points), -1)

        cotangents = {examples: wide.orthonormal(examples, width) for *_, examples in networks}
        count = max(16, math.ceil(len(settings.wide_seeds) * settings.wide_width / width))
        return wide.over_seeds(one, settings.wide_seeds[:count], cotangents)

    measured, error = np.concatenate(wide.limits(run, settings.jobs, "growth"), 1)
    points = [point for _, points in settings.jobs for point in points]
    expected = np.array([[theory(*point, activation) for activation in settings.activations] for point in points])
    columns = {"theory": expected[..., 0], "measured": measured, "error": np.hypot(error, expected[..., 1])}
    columns = {name: (("point", "activation"), values) for name, values in columns.items()}
    columns["z"] = ("point", "activation"), (measured - expected[..., 0]) / columns["error"][1]
    rivals = sorted({*settings.group_sizes, RIVAL})
    batch = [[theory("batch", size, activation)[0] for activation in settings.activations] for size in rivals]
    columns["batch_theory"] = ("batch_size", "activation"), np.array(batch)
    columns |= {"norm": ("point", [name for name, _ in points]), "size": ("point", [size for _, size in points])}
    return xr.Dataset(columns, {"activation": list(settings.activations), "batch_size": rivals})


def measure_deep(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Predicted decades of the squared gradient; accuracy at the best rate, (model, seed)."""
    ds = pooled(ds, POOL)
    sizes, shape = settings.deep_sizes, {"depth": settings.deep_layers, "width": settings.deep_width}
    networks = {
        name: bnjax.models.deep(**shape, activation=DEEP, norm=norm_of(name, size, DEEP))
        for name, size in sizes.items()
    }
    config = bnjax.TrainConfig(steps=settings.deep_steps, batch_size=settings.deep_batch_size)
    axes = {"init_scale": [1.0], "learning_rate": sorted(settings.deep_rates), "seed": list(settings.deep_seeds)}
    hyper = bnjax.Hyperparams(momentum=0.9)
    trained = robustness.at_best(robustness.final_accuracy(bnjax.sweep(networks, ds, config, axes, hyper=hyper)))
    trained = trained.isel(init_scale=0).sel(model=list(sizes))
    decades = [settings.deep_layers * math.log10(theory(name, size, DEEP)[0]) for name, size in sizes.items()]
    columns = {"decades": ("model", decades), "accuracy": (("model", "seed"), trained.values)}
    columns["rate"] = ("model", trained.learning_rate.values)
    return xr.Dataset(columns, {"model": list(sizes), "seed": trained.seed.values})


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Of both."""
    return xr.merge([measure_wide(settings), measure_deep(settings, ds)])


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Theory against measurement, GroupNorm against BN, and prediction against training."""
    grown, z = results.theory, np.abs(results.z.values.ravel())
    alarm = z.size * math.erfc(4 / math.sqrt(2))
    agree = Finding(
        "Wide networks of every norm agree with the theory.",
        checks=[
            Check("|z| of each point", np.where(np.isfinite(z), z, math.inf), below=4, holds="all"),
            Check("points", z.size),
            *(Check(f"points within {k} of their standard errors", (z < k).mean(), unit="%") for k in (1, 2)),
            Check("growth in theory", grown.values),
            Check("growth measured", results.measured.values),
        ],
        note=f"If the theory is exact, at most {number(alarm, '%')} of such tables have a |z| above 4.",
    )
    groups, against = results.isel(point=results.norm.values == "group"), []
    sizes = ", ".join(map(str, groups["size"].values))
    for activation in results.activation.values if "group" in settings.norms else ():
        group, batch = groups.theory.sel(activation=activation), results.batch_theory.sel(activation=activation)
        for words, rival in (
            (f"batches of {sizes}", batch.sel(batch_size=groups["size"].values).values),
            (f"a batch of {RIVAL}", float(batch.sel(batch_size=RIVAL))),
        ):
            statement = f"{activation}: growth in groups of {sizes} over BN's in {words}"
            against.append(Check(statement, group.values / rival, above=1, holds="all"))
    predicted, trained = [], []
    for name in results.model.values:
        decades = float(results.decades.sel(model=name))
        bound = {"within": (-KEPT, KEPT)} if name in MEAN_REMOVED else {"below": -KEPT}
        predicted.append(Check(f"{NAMES[name]}: decades over {settings.deep_layers} layers", decades, **bound))
        side, word = ("above", "trains") if abs(decades) <= KEPT else ("below", "does not train")
        accuracy = results.accuracy.sel(model=name).values
        trained.append(Check(f"{NAMES[name]}: {word}; test accuracy", accuracy, unit="%", **{side: LEARNS}))
    network = f"{settings.deep_layers} sigmoid layers of {settings.deep_width}"
    faster = Finding("GroupNorm explodes faster than BN.", checks=against, note="Growth per layer, in theory.")
    return [
        agree,
        *([faster] if "group" in settings.norms else []),
        Finding(
            "A deep sigmoid network keeps its gradient behind norms that remove the mean over the data (BN, l1, "
            "l-infinity, weight standardization), and not behind the others.",
            checks=predicted,
            note=f"The squared gradient in theory; {network}, batches of {settings.deep_batch_size}.",
        ),
        Finding(
            "The predicted gradient decides which norms make a deep sigmoid network trainable.",
            checks=trained,
            note=f"Predicted to train: those whose squared gradient moves by {KEPT} decades at most. {network}, "
            f"{settings.deep_steps} steps, the best of learning rates {', '.join(map(number, settings.deep_rates))}.",
        ),
    ]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Each point; each trained network."""
    shown = results[["norm", "size", "theory", "measured", "error", "z"]]
    shown = shown.assign(
        norm=("point", [NAMES[name] if name != "group" else "GroupNorm" for name in shown.norm.values]),
        size=("point", [str(size or "-") for size in shown["size"].values]),
    )
    columns = [("norm", "{norm}"), ("size", "{size}"), ("activation", "{activation}"), ("theory", "{theory:.4f}")]
    columns += [("measured", "{measured:.4f} ± {error:.4f}"), ("z", "{z:+.1f}")]
    caption = (
        "Size: of the batch or of a group. Measured: the limit of infinite width, from two widths; theory: of infinite "
        "width, of LayerNorm and RMSNorm, too. z: measured - theory in standard errors. No norm: He's weights."
    )
    title = "Growth per layer of the squared gradient norm at epsilon 0"
    rows = [
        [NAMES[name], f"{float(one.decades):+.1f}", number(float(one.rate)), number(float(one.accuracy.median()), "%")]
        for name, one in ((name, results.sel(model=name)) for name in results.model.values)
    ]
    headers = ["norm", "decades of the squared gradient", "best rate", "test accuracy"]
    return [
        wide.points(title, shown, columns, caption),
        Table(f"{settings.deep_layers} sigmoid layers, predicted and trained", headers, rows, "Medians over seeds."),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Measured over theory; growth and accuracy by norm."""
    order = sorted(range(results.sizes["point"]), key=lambda i: [*NAMES].index(results.norm.values[i]))
    results = results.isel(point=order)
    labels = [f"{NAMES[name].removesuffix(f' of {GROUP_SIZE}')} {size or ''}".strip()
              for name, size in zip(results.norm.values, results["size"].values, strict=True)]  # fmt: skip
    measured, by_norm = {}, {}
    for activation in results.activation.values:
        one = results.sel(activation=activation).sortby("theory")
        bars = xr.concat([one.measured - one.error, one.measured, one.measured + one.error], "seed")
        measured[activation] = xr.DataArray(bars.values, {"x": one.theory.values}, ("seed", "x"))
        unsorted = results.measured.sel(activation=activation).values
        by_norm[activation] = xr.DataArray(unsorted, {"x": np.arange(len(labels))}, ("x",))
    ends = np.array([float(results.theory.min()), float(results.theory.max())])
    line = {"theory": xr.DataArray(ends, {"x": ends}, ("x",))}
    axis = {"xlabel": "", "xscale": "linear"}
    medians = 100 * results.accuracy.median("seed").values
    accuracy = xr.DataArray(medians, {"x": np.arange(len(medians))}, ("x",))
    shown = [
        plots.Panel("growth per layer of the squared gradient", "measured", measured | line, xlabel="theory",
                    yscale="log", theory=["theory"], unconnected=measured),
        plots.Panel("the same by norm", "measured", by_norm, **axis, yscale="log", unconnected=by_norm,
                    levels={"1": 1}),
        plots.Panel(f"{settings.deep_layers} sigmoid layers", "test accuracy (%)", {"trained": accuracy}, **axis,
                    unconnected=["trained"], levels={"chance": 100 * CHANCE}),
    ]  # fmt: skip
    drawn = plots.panels(shown)
    for axes, names in zip(drawn.axes[1:], (labels, [NAMES[name] for name in results.model.values]), strict=True):
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    return drawn


CLAIM = Claim(
    name="growth",
    question="How fast do gradients grow per layer behind each norm, and which norms make a deep network trainable?",
    source="Yang et al. 2019, A Mean Field Theory of Batch Normalization; for other norms our own derivations.",
    explanation="Inputs are drawn as if they came from a layer below. Networks of the same widths share their weights, "
    "so that their z are not independent. Trained on images averaged over 2 x 2 pixels.",
    settings=Settings,
    quick=Settings(),
    full=Settings(
        activations=("relu", "tanh", "sigmoid", "gelu"), batch_sizes=(16, 64), lp_batch_sizes=(16, 64), wide_depth=3,
        wide_seeds=tuple(range(4096)), deep_seeds=tuple(range(5)), deep_steps=500,
    ),
    tiny=Settings(
        norms=("batch", "group"), activations=("relu",), batch_sizes=(8,), lp_batch_sizes=(8,), group_sizes=(8,),
        wide_width=16, wide_seeds=tuple(range(64)), deep_layers=4, deep_width=16, deep_rates=(0.1,),
        deep_seeds=(0, 1), deep_steps=3, deep_batch_size=20,
    ),
    measure=measure, judge=judge, tables=tables, figure=figure, share=20,
)  # fmt: skip
