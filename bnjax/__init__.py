"""bnjax: what batch normalization does to initialization."""

from bnjax import activations, batch_norm, data, initializers, jacobian, models, norms, probes, theory
from bnjax.analysis.robustness import robustness
from bnjax.export import save as save_results
from bnjax.models.mlp import mlp
from bnjax.networks import as_model, describe
from bnjax.statistics import recompute_statistics
from bnjax.sweeps.run import sweep
from bnjax.sweeps.store import load as load_results
from bnjax.sweeps.store import status
from bnjax.training import TrainConfig, make_train
from bnjax.types import BatchNormParams, BatchStats, Dataset, History, Hyperparams, Model, Norm, Probe, Snapshot
from bnjax.version import __version__

__all__ = [
    "BatchNormParams",
    "BatchStats",
    "Dataset",
    "History",
    "Hyperparams",
    "Model",
    "Norm",
    "Probe",
    "Snapshot",
    "TrainConfig",
    "__version__",
    "activations",
    "as_model",
    "batch_norm",
    "data",
    "describe",
    "initializers",
    "jacobian",
    "load_results",
    "make_train",
    "mlp",
    "models",
    "norms",
    "probes",
    "recompute_statistics",
    "robustness",
    "save_results",
    "status",
    "sweep",
    "theory",
]
