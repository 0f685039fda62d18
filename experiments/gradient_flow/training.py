"""Gradients and weights in a short training of the first activation and depth."""

import math

import xarray as xr

import bnjax
from bnjax import probes
from bnjax.findings import Check, Finding
from experiments.claim import Claim
from experiments.gradient_flow import common
from experiments.gradient_flow.common import NORM_NAMES, Settings
from experiments.table import Table

COLUMNS = {"|dL/dW|": ("gradient_norm", ""), "|W|": ("weight_norm", ""), "angle": ("angle", ""),
           "lr / |W|^2": ("effective_learning_rate", ""), "diverged": ("lost", "%")}  # fmt: skip
SEEDS, TEST_EXAMPLES = 3, 256  # at most; accuracy is not the point


def measure(settings: Settings, ds: bnjax.Dataset | None) -> xr.Dataset:
    """With a probe of the weights."""
    models = {
        norm: common.model(settings, settings.activations[0], norm, settings.depths[0]) for norm in settings.norms
    }
    shape, size = ds.train_x.shape[1:], settings.batch_size
    probe = {norm: probes.weights(model, shape, batch_size=size) for norm, model in models.items()}
    ds = ds._replace(test_x=ds.test_x[:TEST_EXAMPLES], test_y=ds.test_y[:TEST_EXAMPLES])
    config = bnjax.TrainConfig(steps=max(settings.steps), batch_size=size, eval_every=math.gcd(*settings.steps))
    axes = {"init_scale": sorted(settings.shown_scales), "seed": settings.seeds[:SEEDS]}
    hyper = bnjax.Hyperparams(learning_rate=settings.learning_rate)
    results = bnjax.sweep(models, ds, config, axes, hyper=hyper, probe=probe)
    return results.sel(probe_step=list(settings.steps))


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """The angle by which the first layer turns with BN, by its size at the start."""
    if "batch" not in settings.norms:
        return []
    angle, scales = results.angle.isel(probe_step=-1).sel(model="batch", layer="hidden_0"), results.init_scale.values
    words = f"angle after {settings.steps[-1]} steps, at {scales[-1]:g} over that at {scales[0]:g}"
    bound = {"below": 1} if len(scales) > 1 else {}
    check = Check(words, (angle.isel(init_scale=-1) / angle.isel(init_scale=0)).values, **bound)
    claim = "With BN, the larger the initial weights, the less a training turns those of the first layer."
    return [Finding(claim, "van Laarhoven 2017", [check])]


def tables(results: xr.Dataset, settings: Settings) -> list[Table]:
    """First and last hidden layer along training, medians over seeds; of each norm."""
    ends = [f"hidden_{i}" for i in dict.fromkeys((0, settings.depths[0] - 1))]
    lost = (results.diverged & (results.diverged_step <= results.probe_step)).mean("seed")
    medians = results.drop_dims("step").astype(float).median("seed").assign(lost=lost).sel(layer=ends)
    title = f"along training: SGD, learning rate {settings.learning_rate:g}, momentum 0.9, cross-entropy"
    caption = (
        f"Medians over {results.sizes['seed']} seeds. |dL/dW|: of the first {settings.batch_size} examples. Angle: "
        "between W and its start, in degrees. lr / |W|^2: the effective learning rate behind a norm. Diverged: of the "
        "seeds. The figures of a run that diverged may be infinite, or NaN, which medians leave out."
    )
    first, dims = (
        f"{settings.activations[0]}, {settings.depths[0]} hidden layers",
        ("init_scale", "probe_step", "layer"),
    )
    return [
        common.points(
            f"{first}, {NORM_NAMES[norm]}, {title}", medians.sel(model=norm, drop=True), dims, COLUMNS, caption
        )
        for norm in settings.norms
    ]


CLAIM = Claim(
    name="training",
    question="How do gradients and weights move in a short training?",
    source="van Laarhoven 2017: behind a norm, a step turns W by an angle that goes with lr / |W|^2.",
    settings=Settings, quick=Settings(), full=common.FULL, tiny=common.TINY,
    measure=measure, judge=judge, tables=tables,
)  # fmt: skip
