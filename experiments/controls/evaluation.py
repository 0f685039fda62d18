"""Do running statistics fail in evaluation where training does not?"""

import jax.numpy as jnp
import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from experiments.controls.common import (
    Control,
    Finding,
    Setup,
    at,
    number,
    percent,
    points,
    rates_and_scales,
    run,
    spread,
)

STATISTICS_EXAMPLES = 2000  # over which statistics are recomputed


def measure(setup: Setup) -> xr.Dataset:
    """Dimensions (model, init_scale, seed, probe_step): accuracy with running, batch and recomputed statistics."""
    models, probe = {}, {}
    for momentum in (0.9, 0.99):
        name = f"momentum {momentum}"
        model = models[name] = bnjax.mlp(**(setup.network | {"momentum": momentum}))
        # With momentum 0 the running statistics are those of the last batch, here of many examples.
        latest = bnjax.mlp(**(setup.network | {"momentum": 0.0}))

        def measure(snapshot, model=model, latest=latest):
            params, stats, ds = snapshot.params, snapshot.batch_stats, snapshot.ds
            _, anew = latest.apply(params, stats, ds.train_x[:STATISTICS_EXAMPLES], train=True)
            found = {
                "running": model.apply(params, stats, ds.test_x, train=False)[0],
                "batch": model.apply(params, stats, ds.test_x, train=True)[0],
                "recomputed": model.apply(params, anew, ds.test_x, train=False)[0],
            }
            return {
                name: (logits.argmax(-1) == ds.test_y).mean(dtype=jnp.float32)
                for name, logits in found.items()
            }

        probe[name] = bnjax.Probe(measure)
    axes = rates_and_scales(setup)
    return run(setup, models, setup.images, setup.config, axes, probe=probe)


def early_and_last(results: xr.Dataset) -> list[int]:
    """The probed step nearest to a tenth of the run, and the last one."""
    steps = results.probe_step.values[1:]
    return list(dict.fromkeys((int(steps[np.abs(steps - steps[-1] / 10).argmin()]), int(steps[-1]))))


def judge(results: xr.Dataset) -> list[Finding]:
    """Early and at the end, for each momentum."""
    found = []
    gap = results.recomputed - results.running
    for name in results.model.values:
        for step in early_and_last(results):
            one = gap.sel(model=name, probe_step=step)
            medians = one.median("seed")
            worst = float(medians.idxmax("init_scale"))
            failing = medians.init_scale.values[medians.values > 0.05]
            parts = [
                f"{kind} {spread(results[kind].sel(model=name, probe_step=step, init_scale=worst), percent)}"
                for kind in ("running", "recomputed", "batch")
            ]
            at_one = spread(at(one, 1), points)
            found.append(
                Finding(
                    f"Running statistics ({name}) fail in evaluation after {step} steps: they cost more than "
                    f"5 points.",
                    f"worst at scale {number(worst)}: {', '.join(parts)}; at scale 1 they cost {at_one} "
                    f"points; "
                    f"they cost more than 5 points at {len(failing)} of {len(medians)} scales",
                    {
                        "at some scale": bool(len(failing)),
                        "at scale 1": bool(at(medians, 1) > 0.05),
                        "at most scales": len(failing) > len(medians) / 2,
                    },
                )
            )
    restored = np.abs(results.recomputed - results.batch).isel(probe_step=slice(1, None)).median("seed")
    found.append(
        Finding(
            "The failure is one of evaluation only: statistics taken anew over training data, at the same "
            "weights, "
            "restore what batch statistics give.",
            f"recomputed and batch statistics differ by at most {percent(float(restored.max()))} at any "
            f"scale, momentum "
            f"and step (medians over seeds), by {percent(float(restored.median()))} in the median",
            {
                "within 5 points everywhere": bool(restored.max() < 0.05),
                "within 2 points in the median": bool(restored.median() < 0.02),
            },
        )
    )
    return found


def draw(results: xr.Dataset):
    """Momentum by early and late."""
    shown = []
    for name in results.model.values:
        for step in early_and_last(results):
            one = 100 * results[["running", "batch", "recomputed"]].sel(model=name, probe_step=step)
            labels = {
                "running": "running",
                "batch": "of the test batch",
                "recomputed": "taken anew over training data",
            }
            series = {labels[kind]: one[kind] for kind in labels}
            shown.append(
                plots.Panel(f"{name}, {step} steps", "test accuracy (%)", series, levels={"chance": 10})
            )
    return plots.panels(shown, title="Which statistics evaluation uses", columns=2)


CONTROL = Control(
    "Do running statistics fail?",
    "Training normalizes by the batch's statistics, evaluation by running averages of them, which begin "
    "at mean 0 and "
    "variance 1 and forget that by a factor of BN's momentum a step (0.9 or 0.99; not the optimizer's "
    "momentum). Compared "
    "with statistics of the test batch, and with statistics taken anew over training data at the same "
    "weights.",
    measure,
    judge,
    draw,
)
