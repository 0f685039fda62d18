"""Features or a readout? Hidden weights trained, and frozen as drawn, on images and on XOR."""

import dataclasses

import numpy as np
import xarray as xr

import bnjax
from bnjax import plots
from bnjax.data import synthetic
from bnjax.findings import Check, Finding, number
from experiments.claim import Claim
from experiments.settings import at_least, setting
from experiments.why_robust import common
from experiments.why_robust.common import CHANCE, FULL, TINY, at, final, hidden, networks, run

TITLES = {"images": "Fashion-MNIST", "xor": "XOR of two of the inputs"}


@dataclasses.dataclass(frozen=True)
class Settings(common.Settings):
    """XOR takes longer."""

    frozen_steps: int = setting(300, "Optimizer steps of the control of frozen weights: XOR takes longer.")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, frozen_steps=2)


def measure(settings: Settings, ds: bnjax.Dataset) -> xr.Dataset:
    """Both tasks, with hidden weights trained and frozen: dimensions (task, model, init_scale, seed)."""
    shape = ds.train_x.shape
    xor = synthetic.sparse_parity(
        dimensions=int(np.prod(shape[1:])), train_examples=len(ds.train_x), test_examples=len(ds.test_x)
    )
    # Of the same shapes, so that one program serves both tasks.
    xor = xor._replace(train_x=xor.train_x.reshape(shape), test_x=xor.test_x.reshape(-1, *shape[1:]))
    models, probe = networks(settings, ds, {"trained": {}, "frozen": {"freeze_hidden": True}})
    config = dataclasses.replace(settings.config, steps=settings.frozen_steps, eval_every=None)
    tasks = xr.Variable("task", np.asarray(["images", "xor"], object))
    found = [run(settings, models, one, config=config, probe=probe) for one in (ds, xor)]
    return xr.concat(found, tasks, combine_attrs="override")


def final_accuracy(results: xr.Dataset, task: str) -> xr.DataArray:
    """Of a run that diverged: of guessing among the task's classes. On XOR the network has more outputs than that."""
    last = final(results.sel(task=task))
    return last.test_accuracy.where(~last.diverged, CHANCE[task])


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """At scale 1, at the largest scale, at the smallest."""
    accuracy = xr.concat([final_accuracy(results, task) for task in results.task.values], "task")
    # Seed by seed: both start from the same draw.
    gain = accuracy.sel(model="trained") - accuracy.sel(model="frozen")
    angle = hidden(results.angle.sel(model="trained")).isel(probe_step=-1).median("layer")
    low, high = float(results.init_scale.min()), float(results.init_scale.max())
    learned = gain.sel(task="xor").median("seed")
    where = ", ".join(map(number, learned.init_scale.values[learned.values > 0.1])) or "no scale"
    best = accuracy.sel(model="frozen").median("seed").max("init_scale")  # the best readout

    def beside(scale):
        one = at(accuracy, scale)
        parts = [(t, m) for t in ("xor", "images") for m in ("trained", "frozen")]
        return [Check(f"accuracy, {t}, {m}", one.sel(task=t, model=m).values, unit="%") for t, m in parts]

    def turned(text, values, **bound):
        return Check(text, values.values, unit="degrees", **bound)

    above = {t: at(accuracy.sel(task=t, model="trained"), low).values - float(best.sel(task=t)) for t in CHANCE}
    one, large = at(accuracy.sel(task="xor"), 1), at(gain, high)
    return [
        Finding(
            "At init scale 1 a BN network learns features that random ones cannot replace.",
            checks=[
                Check("above 90% on XOR", one.sel(model="trained").values, unit="%", above=0.9),
                Check("frozen below 70% on XOR", one.sel(model="frozen").values, unit="%", below=0.7),
                *beside(1),
                turned("hidden weights turned by (XOR)", at(angle.sel(task="xor"), 1)),
            ],
            note=f"More than 10 points above frozen on XOR at {where}.",
        ),
        Finding(
            f"At init scale {number(high)} no features are learned: a readout on random ones does the work.",
            checks=[
                turned("hidden weights turn by less than 5 degrees", at(angle, high).max("task"), below=5),
                *(
                    Check(
                        f"within 3 points of frozen, {t}", large.sel(task=t).values, unit="points", within=(-0.03, 0.03)
                    )
                    for t in ("images", "xor")
                ),
                *beside(high),
                turned("hidden weights turned by (XOR)", at(angle.sel(task="xor"), high)),
            ],
        ),
        Finding(
            f"At init scale {number(low)} useful features are learned.",
            checks=[
                turned("hidden weights turn by more than 45 degrees", at(angle, low).min("task"), above=45),
                Check(
                    "more than 10 points above the best frozen network on XOR", above["xor"], unit="points", above=0.1
                ),
                Check("above the best frozen network on images", above["images"], unit="points", above=1e-6),
                *beside(low),
                turned("hidden weights turned by (XOR)", at(angle.sel(task="xor"), low)),
                *(Check(f"frozen at its best scale, {t}", float(best.sel(task=t)), unit="%") for t in CHANCE),
            ],
        ),
    ]


def figure(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """Accuracy on both tasks, and the angles."""
    shown = []
    for task in results.task.values:
        accuracy = 100 * final_accuracy(results, task)
        series = {f"hidden weights {m}": accuracy.sel(model=m) for m in ("trained", "frozen")}
        level = {"chance": 100 * CHANCE[task]}
        shown.append(plots.Panel(TITLES[task], "final test accuracy (%)", series, levels=level))
    angle = results.angle.sel(model="trained", task="xor").isel(probe_step=-1)
    series = {str(layer): angle.sel(layer=layer) for layer in angle.layer.values}
    shown.append(plots.Panel("Turn of the weights (XOR)", "angle to the start (degrees)", series))
    return plots.panels(shown, title="Features or a readout on random features?")


CLAIM = Claim(
    name="frozen",
    question="Features or a readout?",
    source="",
    explanation="A network can reach a fair accuracy without learning features: a linear readout on top of random "
    "hidden layers will do for images. So each network is trained beside one whose hidden weights stay as drawn "
    "(frozen), also on XOR: the label is the sign of the product of two of 49 inputs, which random features of this "
    "width cannot tell. The angle says how far a weight matrix turned; 90 degrees: nothing of the initial draw is "
    "left.",
    settings=Settings,
    quick=Settings(),
    full=Settings(**FULL, frozen_steps=1000),
    tiny=Settings(**TINY, frozen_steps=5),
    measure=measure,
    judge=judge,
    figure=figure,
    share=11,
)
