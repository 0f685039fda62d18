"""The init scales from which each norm trains, in each family of networks."""

import dataclasses
import math

import numpy as np
import xarray as xr

import bnjax
from bnjax import norms, plots
from bnjax.analysis import robustness
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.common import parse_floats, parse_seeds
from experiments.norms import common
from experiments.norms.common import FAMILIES, FROZEN, INSTEAD, NAMES
from experiments.settings import at_least, check_axis, positive, require, setting
from experiments.table import Table

TRAINS = 0.8  # of the best median accuracy of the family
LEARNS = 0.05  # of accuracy above guessing, from which a rate counts as best
CHANCE = 0.1
SHOWN = ("batch", "layer", "group", "rms", "weight", "none")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Networks, and the grid on which they are trained."""

    norms: tuple[str, ...] = setting((*NAMES,), f"Of {', '.join(norms.NORMS)}.")
    families: tuple[str, ...] = setting(FAMILIES, f"Of {', '.join(FAMILIES)}.")
    seeds: tuple[int, ...] = setting((0, 1, 2), "A count, a range 0:5 or a list 0,1,2.", parse_seeds)
    init_scales: tuple[float, ...] = setting(
        tuple(parse_floats("", "1e-4:1e4:9")), "A list, or low:high:count for log spacing."
    )
    learning_rate: float = setting(0.1, "Of SGD with momentum 0.9, at all scales.")
    rates: tuple[float, ...] = setting((0.01, 1.0), "Further learning rates, at --rate_scales.")
    rate_scales: tuple[float, ...] = setting((0.01, 1.0, 100.0), "Scales of the further rates, of --init_scales.")
    layers: int = setting(3, "Hidden layers of the fully connected network.")
    hidden_width: int = setting(128, "Units in each.")
    steps: int = setting(100, "Optimizer steps of the fully connected network.")
    batch_size: int = setting(128, "Examples per step of the fully connected network.")
    channels: int = setting(8, "Of the first of two layers, or blocks, of the networks for images.")
    image_steps: int = setting(100, "Optimizer steps of the networks for images.")
    image_batch_size: int = setting(32, "Examples per step of the networks for images.")
    pool: int = setting(2, "Images are averaged over squares of this many pixels a side for those networks.")

    def __post_init__(self):
        for field, table in (("norms", norms.NORMS), ("families", FAMILIES)):
            names = getattr(self, field)
            unknown = [name for name in names if name not in table]
            require(not unknown, field, f"must be of {', '.join(table)}, got {','.join(names)}")
            require(len({*names}) == len(names) > 0, field, f"must be different names, got {','.join(names)!r}")
        require("batch" in self.norms, "norms", f"must have batch, to compare with; got {','.join(self.norms)}")
        at_least(self, layers=1, hidden_width=1, batch_size=2, steps=1, image_steps=1, image_batch_size=2, pool=1)
        at_least(self, channels=1)
        common.check_groups(self, "channels", "hidden_width")
        require(len(self.init_scales) > 1, "init_scales", f"must be several, got {self.init_scales}")
        positive(self, "learning_rate")
        for field, axis in (("seeds", "seed"), ("init_scales", "init_scale"), ("rates", "learning_rate")):
            check_axis(self, field, axis)
        inside = {*self.rate_scales} <= {*self.init_scales}
        require(inside, "rate_scales", f"must be of the init_scales, got {self.rate_scales}")

    def networks(self, family: str) -> dict[str, bnjax.Model]:
        """{name: network} of that family: every norm, what is used in its place, and BN's frozen baseline."""
        dense = family == "mlp"
        size = {"width": self.hidden_width if dense else self.channels, "layers": self.layers if dense else 2}
        found = {NAMES[norm]: common.network(family, norm, **size) for norm in self.norms}
        found[FROZEN] = common.network(family, "batch", **size, freeze_hidden=True)
        if "none" in self.norms:
            for name, (options, families) in INSTEAD.items():
                if family in families:
                    found[name] = common.network(family, "none", **size, **options)
        return found


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Final test accuracy and divergence: (network, init_scale, learning_rate, seed); NaN where it was not trained.

    `network` is "FAMILY: NAME". The other rates than the first are trained at few scales.
    """
    images, found, hyper = common.pooled(ds, settings.pool), [], bnjax.Hyperparams(momentum=0.9)
    axes = {"init_scale": sorted(settings.init_scales), "learning_rate": [settings.learning_rate]}
    rates = sorted({*settings.rates} - {settings.learning_rate})
    more = {"init_scale": sorted(settings.rate_scales), "learning_rate": rates}
    for family in settings.families:
        dense = family == "mlp"
        steps, size = ("steps", "batch_size") if dense else ("image_steps", "image_batch_size")
        config = bnjax.TrainConfig(steps=getattr(settings, steps), batch_size=getattr(settings, size))
        models = settings.networks(family)
        parts = []
        for one in (axes, more) if rates else (axes,):
            grid = one | {"seed": list(settings.seeds)}
            results = bnjax.sweep(models, ds if dense else images, config, grid, hyper=hyper)
            accuracy = robustness.final_accuracy(results).rename("accuracy")
            parts.append(accuracy.reset_coords(drop=True))
        both = xr.merge(parts, join="outer", compat="no_conflicts")
        names = [f"{family}: {name}" for name in both.model.values]
        found.append(both.assign_coords(model=np.asarray(names, object)).rename(model="network"))
    return xr.concat(found, "network", join="outer")


def of_family(results: xr.Dataset, family: str) -> xr.DataArray:
    """Its accuracies [model, init_scale, learning_rate, seed], names without the family."""
    names = [name for name in results.network.values if name.startswith(f"{family}: ")]
    own = results.accuracy.sel(network=names).rename(network="model")
    return own.assign_coords(model=np.asarray([name.partition(": ")[2] for name in names], object))


def ranges(results: xr.Dataset, settings: Settings, family: str) -> dict[str, dict[float, robustness.Summary]]:
    """Of its networks at the rate that all scales have; the end of a range beside the frozen baseline."""
    accuracy = of_family(results, family).sel(learning_rate=settings.learning_rate, drop=True)
    accuracy = accuracy.transpose("model", "init_scale", "seed")
    names = [str(name) for name in accuracy.model.values if name != FROZEN]
    # Few seeds have no interval worth its resamples: a step of the grid is larger.
    baselines = dict.fromkeys(names, FROZEN)
    return robustness.summarize(accuracy, robustness.THRESHOLDS, baselines=baselines, resamples=1)


def highest_rates(results: xr.Dataset, settings: Settings, family: str) -> dict[str, float]:
    """{network: the highest rate that trains at the scale nearest to 1}; NaN for none."""
    accuracy = of_family(results, family)
    level = TRAINS * float(accuracy.median("seed").max())
    scale = min(settings.rate_scales, key=lambda scale: abs(math.log(scale)))
    passes = accuracy.sel(init_scale=scale).median("seed") >= level
    highest = passes.learning_rate.where(passes).max("learning_rate")
    return {str(name): float(highest.sel(model=name)) for name in highest.model.values}


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Five claims, each over the families."""
    step = float(np.diff(np.log10(sorted(settings.init_scales))).max())
    whole = math.log10(max(settings.init_scales) / min(settings.init_scales))
    rate_step = float(np.diff(np.log10(sorted({settings.learning_rate, *settings.rates}))).max(initial=0))
    found = {family: ranges(results, settings, family) for family in settings.families}
    rates = {family: highest_rates(results, settings, family) for family in settings.families}

    def decades(family, name):
        length = found[family][name][TRAINS].range.decades
        return -step if math.isnan(length) else length  # less than one scale

    def against(other, names, families=settings.families):
        """As robust as the other, but for a step of the grid."""
        words = "decades beyond those of"
        return [
            Check(f"{family}, {name}: {words} {other}", decades(family, name) - decades(family, other), above=-step,
                  unit="decades", step=step)
            for family in families for name in names if name in found[family]
        ]  # fmt: skip

    def no_higher_rate(name):
        return [
            Check(f"{family}, {name}: highest rate, beyond that without a norm", math.log10(own[name] / own["no norm"]),
                  below=1.0, unit="decades", step=rate_step)
            for family, own in rates.items() if name in own and own[name] > 0 and own["no norm"] > 0
        ]  # fmt: skip

    def everywhere(name):
        return [
            Check(f"{family}, {name}: trains over all {number(whole)} decades", decades(family, name), above=whole)
            for family in settings.families if name in found[family]
        ]  # fmt: skip

    others = [NAMES[norm] for norm in settings.norms if norm not in ("batch", "none")]
    level = f"Trains: to {TRAINS:.0%} of the best median of the family, at learning rate {settings.learning_rate:g}."
    findings = [
        Finding(
            "Any normalization makes initialization careless: each trains over as many decades as BN.",
            checks=against("BN", others),
            note=level,
        )
    ]
    if "layer" in settings.norms:
        findings.append(Finding("LayerNorm is as robust as BN.", checks=against("BN", ["LayerNorm"]), note=level))
    if "none" in settings.norms:
        findings += [
            Finding(
                f"{name} only removes the scale at step 0: it trains from every scale, and allows no learning rate ten "
                "times as high as without a norm.",
                checks=everywhere(name) + no_higher_rate(name),
                note=f"The rates are {number(rate_step)} decades apart. {level}",
            )
            for name in ("weight norm", "LSUV")
            if any(name in own for own in found.values())
        ]
    if "residual" in settings.families and "none" in settings.norms:
        checks = against("BN", ["SkipInit", "Fixup"], ("residual",))
        checks.append(*against("BN", ["no norm"], ("residual",)))
        findings.append(
            Finding(
                "Residual connections replace BN: SkipInit and Fixup, and even a plain residual network, train over as "
                "many decades.",
                source="De & Smith 2020; Zhang, Dauphin & Ma 2019",
                checks=checks,
                note=level,
            )
        )
    return findings


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """Decades at each threshold, and the best rate at the scales that have several."""
    rows = []
    for family in settings.families:
        accuracy = of_family(results, family)
        medians = accuracy.median("seed")
        for name, by_threshold in ranges(results, settings, family).items():
            cells = [by_threshold[q].range for q in robustness.THRESHOLDS]
            lengths = ["none" if math.isnan(r.decades) else f"{r.decades:.3g}{'+' * r.open}" for r in cells]
            best = medians.sel(model=name)
            chosen = best.sel(init_scale=sorted(settings.rate_scales))
            top = chosen.idxmax("learning_rate").where(chosen.max("learning_rate") > CHANCE + LEARNS)
            rates = ["none" if math.isnan(rate) else f"{rate:g}" for rate in top.values]
            rows.append([family, name, *lengths, f"{100 * float(best.max()):.1f}", ", ".join(rates)])
    scales = ", ".join(robustness.scale_text(scale) for scale in sorted(settings.rate_scales))
    columns = ["network", "norm", *(f"{q:.0%}" for q in robustness.THRESHOLDS), "best", "best rate"]
    caption = (
        "Decades of init_scale over which the median test accuracy is at least that part of the best of the family, "
        f"at learning rate {settings.learning_rate:g} (+: to an end of the grid). Best: median accuracy in percent, "
        f"at any rate. Best rate: at scales {scales}."
    )
    return [Table("Robust range by norm and network", columns, rows, caption)]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Accuracy over init_scale by norm, a panel for each family."""
    shown = []
    for family in settings.families:
        accuracy = 100 * of_family(results, family).sel(learning_rate=settings.learning_rate)
        names = [NAMES[norm] for norm in SHOWN if norm in settings.norms] + [FROZEN]
        series = {name: accuracy.sel(model=name) for name in names}
        shown.append(plots.Panel(family, "final test accuracy (%)", series, levels={"chance": 100 * CHANCE}))
    return plots.panels(shown, title="Is it batch normalization, or any normalization?", columns=len(shown))


QUICK = Settings()
CLAIM = Claim(
    name="robust",
    question="From which init scales does each norm train?",
    source="",
    explanation="The main experiment, for every norm and family. A norm of activations hides the size of the weights "
    "before it going forward, and divides their gradient by it going back; a norm of the weights does the same.",
    settings=Settings,
    quick=QUICK,
    full=dataclasses.replace(
        QUICK,
        seeds=tuple(range(5)),
        init_scales=tuple(parse_floats("", "1e-4:1e4:17")),
        steps=300,
        image_steps=300,
    ),
    tiny=Settings(
        norms=("batch", "none"),
        families=("mlp",),
        seeds=(0, 1),
        init_scales=(0.01, 1.0, 100.0),
        rates=(1.0,),
        rate_scales=(1.0,),
        layers=1,
        hidden_width=8,
        steps=3,
        batch_size=50,
        channels=2,
        image_steps=3,
        image_batch_size=20,
        pool=1,
    ),
    measure=measure,
    judge=judge,
    figure=figure,
    tables=tables,
    share=60,
)  # fmt: skip
