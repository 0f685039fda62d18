"""Do running statistics fail in evaluation where training does not?"""

import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.why_robust.common import FULL, TINY, Settings, at, run

STATISTICS_EXAMPLES = 2000  # over which statistics are recomputed
COST = 0.05  # of accuracy, from which running statistics fail
KINDS = {"running": "running", "batch": "of the test batch", "recomputed": "taken anew over training data"}


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Dimensions (model, init_scale, seed, probe_step): accuracy with running, batch and recomputed statistics."""
    models, probe = {}, {}
    for momentum in (0.9, 0.99):
        name = f"momentum {momentum}"
        model = models[name] = bnjax.mlp(**(settings.network | {"momentum": momentum}))
        # With momentum 0 the running statistics are those of the last batch, here of many examples.
        latest = bnjax.mlp(**(settings.network | {"momentum": 0.0}))

        def measure(snapshot, model=model, latest=latest):
            params, stats, ds = snapshot.params, snapshot.batch_stats, snapshot.ds
            _, anew = latest.apply(params, stats, ds.train_x[:STATISTICS_EXAMPLES], train=True)
            found = {
                "running": model.apply(params, stats, ds.test_x, train=False)[0],
                "batch": model.apply(params, stats, ds.test_x, train=True)[0],
                "recomputed": model.apply(params, anew, ds.test_x, train=False)[0],
            }
            return {n: (logits.argmax(-1) == ds.test_y).mean(dtype=jnp.float32) for n, logits in found.items()}

        probe[name] = bnjax.Probe(measure)
    return run(settings, models, ds, probe=probe)


def early_and_last(results: xr.Dataset) -> list[int]:
    """The probed step nearest to a tenth of the run, and the last one."""
    steps = results.probe_step.values[1:]
    return list(dict.fromkeys((int(steps[np.abs(steps - steps[-1] / 10).argmin()]), int(steps[-1]))))


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Early and at the end, for each momentum."""
    found = []
    for name in results.model.values:
        for step in early_and_last(results):
            one = results.sel(model=name, probe_step=step)
            cost = one.recomputed - one.running
            medians = cost.median("seed")
            worst, middle = float(medians.idxmax("init_scale")), int(medians.argsort().values[(medians.size - 1) // 2])
            failing = f"more than 5 points at {int((medians > COST).sum())} of {medians.size} scales"
            cases = {
                "at some scale": cost.sel(init_scale=worst),
                "at scale 1": at(cost, 1),
                "at most scales": cost.isel(init_scale=middle),
            }
            found.append(
                Finding(
                    f"Running statistics ({name}) fail in evaluation after {step} steps: they cost more than 5 points.",
                    checks=[
                        *(Check(text, v.values, unit="points", above=COST) for text, v in cases.items()),
                        *(
                            Check(
                                f"accuracy at the worst scale, {kind}", one[kind].sel(init_scale=worst).values, unit="%"
                            )
                            for kind in ("running", "recomputed", "batch")
                        ),
                    ],
                    note=f"They cost {failing}, most at {number(worst)}; at most scales: at the median scale.",
                )
            )
    restored = np.abs(results.recomputed - results.batch).isel(probe_step=slice(1, None))
    middle = restored.median("seed")
    worst = restored.isel(middle.argmax(...))
    return [
        *found,
        Finding(
            "The failure is one of evaluation only: statistics taken anew over training data, at the same weights, "
            "restore what batch statistics give.",
            checks=[
                Check("within 5 points everywhere (the largest median)", worst.values, unit="%", below=COST),
                Check("within 2 points in the median", float(middle.median()), unit="%", below=0.02),
            ],
        ),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Momentum by early and late."""
    shown = []
    for name in results.model.values:
        for step in early_and_last(results):
            one = 100 * results[list(KINDS)].sel(model=name, probe_step=step)
            series = {label: one[kind] for kind, label in KINDS.items()}
            shown.append(plots.Panel(f"{name}, {step} steps", "test accuracy (%)", series, levels={"chance": 10}))
    return plots.panels(shown, title="Evaluation by running, batch and recomputed statistics", columns=2)


CLAIM = Claim(
    name="evaluation",
    question="Do running statistics fail?",
    source="",
    explanation="Training normalizes by the batch's statistics, evaluation by running averages of them, which begin "
    "at mean 0 and variance 1 and forget that by a factor of BN's momentum per step (0.9 or 0.99; not the "
    "optimizer's momentum). They are compared with statistics of the test batch, and with statistics taken anew over "
    "training data at the same weights.",
    settings=Settings,
    quick=Settings(),
    full=Settings(**FULL),
    tiny=Settings(**TINY),
    measure=measure,
    judge=judge,
    figure=figure,
    share=9,
)
