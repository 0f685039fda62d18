"""Shared by all tests: run-time checks of the annotated shapes, two CPU devices, small data."""

import gc
import os
import signal
import tempfile

import jax
import jaxtyping
import numpy as np
import pytest
import quick

quick.set_environment()
jax.config.update("jax_num_cpu_devices", 2)

# A shell lets what it starts in the background ignore SIGINT; so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """A cache folder of its own for each run of the tests, which its workers and the processes they start share."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name
    quick.use()


def pytest_collection_finish():
    """What is imported stays: a collection that went through all of it took long, and there were many."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)


def checked(*, typechecker, of_all=jaxtyping.jaxtyped):
    """The decorator that the import hook puts on all functions, for those that have annotations.

    Others have nothing to be checked, but took a quarter of the CPU time of the tests of stored sweeps: functions
    inside functions are decorated at each call.
    """
    decorate = of_all(typechecker=typechecker)
    return lambda one: decorate(one) if isinstance(one, type) or one.__annotations__ else one


jaxtyping.jaxtyped = checked
with jaxtyping.install_import_hook("bnjax", "beartype.beartype"):
    import bnjax
    from bnjax import compilation
    from bnjax.sweeps import program


@pytest.fixture(scope="module")
def as_users_compile():
    """The programs of sweeps and probes as users compile them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "CPU_OPTIONS", quick.as_users())
        program.compiled.cache_clear()
        yield
    program.compiled.cache_clear()


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def blobs():
    """A task that a small network learns in some dozen steps: 4 Gaussian blobs in 12 dimensions, 2 apart."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12)) * 2 / np.sqrt(2)

    def draw(n):
        y = rng.integers(4, size=n).astype(np.int32)
        return (centres[y] + rng.normal(size=(n, 12))).astype(np.float32), y

    return bnjax.Dataset(*draw(256), *draw(128))
