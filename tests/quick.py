"""Programs of the tests: compiled in a hurry, and kept in a folder that all the tests' processes share.

A test runs most programs once or twice, and compiling them as users do took two thirds of the tests' CPU time. Where
XLA_FLAGS is set they are compiled as users' are: `XLA_FLAGS= python -m pytest`. Those of tests with the fixture
`as_users_compile` always are, since it is up to the compiler whether two programs give the same bits.
"""

import functools
import os

import jax

# Without LLVM's passes, and without XLA's newer way to emit loops, where it still has the older one.
OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={int(value)}" for name, value in OPTIONS.items())
WORTH_KEEPING = "0.1"  # seconds


def set_environment():
    """For this process, if JAX has no array yet, and for those that it starts."""
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = WORTH_KEEPING
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(WORTH_KEEPING))


def use():
    """In each process whose environment was set so. The flags are for all programs but those of sweeps and probes."""
    from bnjax import compilation

    if os.environ.get("XLA_FLAGS") == FLAGS:
        as_users()
        compilation.CPU_OPTIONS = OPTIONS
    compilation.use_cache()


@functools.cache
def as_users():
    """The options of sweeps and probes with which their programs are users', whatever the flags."""
    from bnjax import compilation

    return dict.fromkeys(OPTIONS, True) | compilation.CPU_OPTIONS
