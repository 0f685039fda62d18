"""Features or a readout? Hidden weights trained, and frozen as drawn, on images and on XOR."""

import dataclasses

import numpy as np
import xarray as xr

from bnjax import plots
from experiments.controls.common import (
    CHANCE,
    Control,
    Finding,
    Setup,
    at,
    final,
    hidden,
    networks,
    number,
    percent,
    rates_and_scales,
    run,
    spread,
)


def measure(setup: Setup) -> xr.Dataset:
    """Both tasks, with hidden weights trained and frozen: dimensions (task, model, init_scale, seed)."""
    models, probe = networks(setup, {"trained": {}, "frozen": {"freeze_hidden": True}})
    config = dataclasses.replace(setup.config, steps=setup.values["frozen_steps"], eval_every=None)
    found = [
        run(setup, models, ds, config, rates_and_scales(setup), probe=probe)
        for ds in (setup.images, setup.xor)
    ]
    return xr.concat(
        found, xr.Variable("task", np.asarray(["images", "xor"], object)), combine_attrs="override"
    )


def final_accuracy(results: xr.Dataset, task: str) -> xr.DataArray:
    """Of a run that diverged: of guessing among the task's classes. On XOR the network has more outputs than that."""
    last = final(results.sel(task=task))
    return last.test_accuracy.where(~last.diverged, CHANCE[task])


def judge(results: xr.Dataset) -> list[Finding]:
    """At scale 1, at the largest scale, at the smallest."""
    accuracy = xr.concat([final_accuracy(results, task) for task in results.task.values], "task")
    # Seed by seed: both start from the same draw.
    gain = accuracy.sel(model="trained") - accuracy.sel(model="frozen")
    angle = hidden(results.angle.sel(model="trained")).isel(probe_step=-1).median("layer")
    low, high = float(results.init_scale.min()), float(results.init_scale.max())

    def measured(scale):
        parts = []
        for task in ("xor", "images"):
            one = at(accuracy.sel(task=task), scale)
            trained, frozen = (spread(one.sel(model=m), percent) for m in ("trained", "frozen"))
            parts.append(f"{task}: trained {trained}, frozen {frozen}")
        turned = spread(at(angle.sel(task="xor"), scale), lambda a: f"{a:.2g}")
        return f"at {number(scale)}: {'; '.join(parts)}; hidden weights turned by {turned} degrees (xor)"

    learned = gain.sel(task="xor").median("seed")
    scales = learned.init_scale.values[learned.values > 0.1]
    where = ", ".join(map(number, scales)) or "no scale"

    def median(values):
        return float(values.median("seed"))

    frozen = accuracy.sel(model="frozen").median("seed").max("init_scale")  # the best readout
    above = {
        task: median(at(accuracy.sel(task=task, model="trained"), low)) - float(frozen.sel(task=task))
        for task in CHANCE
    }
    one = at(accuracy.sel(task="xor"), 1).median("seed")
    return [
        Finding(
            "At init scale 1 a BN network learns features that random ones cannot replace.",
            f"{measured(1)}; more than 10 points above frozen on XOR at {where}",
            {
                "above 90% on XOR": bool(one.sel(model="trained") > 0.9),
                "frozen below 70%": bool(one.sel(model="frozen") < 0.7),
            },
        ),
        Finding(
            f"At init scale {number(high)} no features are learned: a readout on random ones does the work.",
            measured(high),
            {
                "hidden weights turn by less than 5 degrees": median(at(angle, high).max("task")) < 5,
                "within 3 points of frozen on images": abs(median(at(gain.sel(task="images"), high))) < 0.03,
                "within 3 points of frozen on XOR": abs(median(at(gain.sel(task="xor"), high))) < 0.03,
            },
        ),
        Finding(
            f"At init scale {number(low)} useful features are learned.",
            f"{measured(low)}; frozen at its best scale: xor {percent(float(frozen.sel(task='xor')))}, "
            f"images {percent(float(frozen.sel(task='images')))}",
            {
                "hidden weights turn by more than 45 degrees": median(at(angle, low).min("task")) > 45,
                "more than 10 points above the best frozen network on XOR": above["xor"] > 0.1,
                "above the best frozen network on images": above["images"] > 0,
            },
        ),
    ]


def draw(results: xr.Dataset):
    """Accuracy on both tasks, and the angles."""
    shown = []
    for task in results.task.values:
        accuracy = 100 * final_accuracy(results, task)
        series = {f"hidden weights {m}": accuracy.sel(model=m) for m in ("trained", "frozen")}
        level = {"chance": 100 * CHANCE[task]}
        title = {"images": "Fashion-MNIST", "xor": "XOR of two of the inputs"}.get(task, task)
        shown.append(plots.Panel(title, "final test accuracy (%)", series, levels=level))
    angle = results.angle.sel(model="trained", task="xor").isel(probe_step=-1)
    series = {str(layer): angle.sel(layer=layer) for layer in angle.layer.values}
    shown.append(plots.Panel("How far weights turned (XOR)", "angle to the start (degrees)", series))
    return plots.panels(shown, title="Features or a readout on random features?")


CONTROL = Control(
    "Features or a readout?",
    "A network can reach a fair accuracy without learning features: a linear readout on top of random "
    "hidden layers "
    "will do for images. So each network is trained beside one whose hidden weights stay as drawn "
    "(frozen), also on XOR: "
    "the label is the sign of the product of two of 49 inputs, which random features of this width "
    "cannot tell. The angle "
    "says how far a weight matrix turned; 90 degrees: nothing of the initial draw is left.",
    measure,
    judge,
    draw,
)
