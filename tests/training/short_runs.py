"""What the tests of runs share: small networks, and runs of them, of which each program is compiled once."""

import jax
import numpy as np

import bnjax

MODEL = bnjax.mlp((16, 16), 4)
SMALL = bnjax.mlp((16,), 4)  # compiles in two thirds of the time
_compiled = {}  # {(id of the model, options): (the model, which so stays, its program)}


def program(model, **options):
    """(hyper, ds) -> `History`."""
    key = id(model), *sorted(options.items())
    if key not in _compiled:
        _compiled[key] = model, compiled_anew(model, **options)
    return _compiled[key][1]


def compiled_anew(model, **options):
    config = bnjax.TrainConfig(**{"steps": 40, "batch_size": 32} | options)
    return jax.jit(bnjax.make_train(model, config))


def concrete(hyper):
    """Of the types that a program is compiled for, whatever the hyperparameters are."""
    return jax.tree.map(np.float32, hyper)._replace(seed=np.uint32(hyper.seed))


def run(ds, hyper=None, model=SMALL, **options):
    return program(model, **options)(concrete(hyper or bnjax.Hyperparams()), ds)
