"""The closed forms of training mode and what autodiff makes of the textbook formula."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bnjax import activations, batch_norm, jacobian
from bnjax.findings import Check, Finding
from experiments.claim import Claim
from experiments.settings import at_least, positive, require, setting

FEATURES = 4
DTYPES = ("float64", "float32")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The batch and the layer."""

    samples: int = setting(12, "N, the size of the batch whose Jacobian is formed.")
    masked: int = setting(0, "How many of the samples are masked.")
    mean: float = setting(1.0, "Of the samples, which are drawn from a normal distribution.")
    std: float = setting(1.0, "Of the samples.")
    scale: float = setting(1.5, "Batch normalization's scale.")
    epsilon: float = setting(0.1, "Batch normalization's epsilon; large by default, to be seen in the spectrum.")
    activation: str = setting("tanh", f"Of the block activation(BN(x W)): {', '.join(activations.ACTIVATIONS)}.")
    seed: int = setting(0, "Draws samples and weights.")
    operator_samples: int = setting(65_536, "N for the operator's time and memory.")

    def __post_init__(self):
        at_least(self, samples=1, masked=0, seed=0, operator_samples=1)
        positive(self, "std", "epsilon")
        require(self.masked < self.samples, "masked", f"leaves none of --samples={self.samples}, got {self.masked}")
        for field in ("mean", "scale"):
            require(math.isfinite(getattr(self, field)), field, f"must be finite, got {getattr(self, field)}")
        allowed = ", ".join(activations.ACTIVATIONS)
        require(self.activation in activations.ACTIVATIONS, "activation", f"must be one of {allowed}")

    @property
    def mask(self) -> np.ndarray:
        """[N, 1]."""
        return np.arange(self.samples)[:, None] >= self.masked


def textbook(x, scale, epsilon, mask):
    """The formula as it is written; a masked sample's output is 0."""
    n = mask.sum()
    mean = jnp.where(mask, x, 0).sum(0) / n
    var = jnp.where(mask, (x - mean) ** 2, 0).sum(0) / n
    return jnp.where(mask, scale * (x - mean) / jnp.sqrt(var + epsilon), 0)


def closed_forms(x, a, dx, kernel, scale, epsilon, mask, phi):
    """{what: array}, by `bnjax.jacobian` and the rule of `bnjax.batch_norm`."""

    def layer(x):
        return scale * batch_norm.normalize(x, epsilon, mask=mask)

    block = jacobian.block(x, kernel, scale, 0.0, phi, epsilon, mask)
    return {
        "dense": jacobian.dense(x, scale, epsilon, mask),
        "operator": jacobian.matvec(x, scale, dx, epsilon, mask),
        "spectrum": jacobian.spectrum(x, scale, epsilon, mask),
        "jacfwd of normalize": jax.jacfwd(layer)(x),
        "jacrev of normalize": jax.jacrev(layer)(x),
        "Hessian-vector product": jacobian.hvp(x, a, dx, epsilon, mask),
        "block, to x": block.x,
        "block, to W": block.kernel,
    }


def references(x, a, dx, kernel, scale, epsilon, mask, phi):
    """{what: (by which means, array, the largest entry of the derivative)}, of the textbook formula."""

    def weighted(x):
        return (jnp.where(mask, a, 0) * textbook(x, 1.0, epsilon, mask)).sum()

    def layer(x, kernel):
        return phi(textbook(jnp.matmul(x, kernel, precision="highest"), scale, epsilon, mask))

    full = jax.jit(jax.jacrev(lambda x: textbook(x, scale, epsilon, mask)))(x)  # [N, C, N, C]
    J = jnp.einsum("icjc->cij", full)
    hessian = jax.jit(jax.hessian(weighted))(x)
    block_x, block_kernel = jax.jit(jax.jacrev(layer, argnums=(0, 1)))(x, kernel)
    vector, largest = jnp.einsum("icjd,jd->ic", hessian, dx), jnp.abs(J).max()
    return {
        "dense": ("jacrev", J, largest),
        "operator": ("jacrev times a vector", jnp.einsum("cij,jc->ic", J, dx), largest),
        "spectrum": ("eigvalsh of jacrev", np.linalg.eigvalsh(J), largest),
        "jacfwd of normalize": ("jacrev", full, largest),
        "jacrev of normalize": ("jacrev", full, largest),
        "Hessian-vector product": ("hessian times a vector", vector, jnp.abs(hessian).max()),
        "block, to x": ("jacrev", block_x, jnp.abs(block_x).max()),
        "block, to W": ("jacrev", jnp.einsum("ifdf->ifd", block_kernel), jnp.abs(block_kernel).max()),
    }


def errors(settings: Settings, dtype: str) -> dict[str, float]:
    """{what against what: the largest error, relative to the derivative's largest entry}; samples are of that type.

    The reference is in float64, from the same samples.
    """
    rng, n = np.random.default_rng(settings.seed), settings.samples
    x = (settings.mean + settings.std * rng.normal(size=(n, FEATURES))).astype(dtype)
    a, dx = rng.normal(size=(2, n, FEATURES)).astype(dtype)
    kernel = rng.normal(size=(FEATURES, FEATURES)).astype(dtype)
    scale = np.full(FEATURES, settings.scale, dtype)
    last = settings.epsilon, settings.mask, activations.get(settings.activation)
    with jax.enable_x64(dtype == "float64"):
        forms = jax.jit(lambda *arrays: closed_forms(*arrays, *last))
        found = jax.tree.map(np.asarray, forms(x, a, dx, kernel, scale))
    with jax.enable_x64(True):
        expected = references(*(np.asarray(array, "float64") for array in (x, a, dx, kernel, scale)), *last)
    return {
        f"{name} against {means}": float(np.abs(found[name] - np.asarray(value)).max() / max(float(unit), 1e-300))
        for name, (means, value, unit) in expected.items()
    }


def operator_cost(seed: int, samples: int) -> tuple[float, int]:
    """Seconds of J times a vector for one feature, and bytes of working memory."""
    x = jax.random.normal(jax.random.key(seed), (samples, 1))
    program = jax.jit(lambda x, dx: jacobian.matvec(x, 1.0, dx)).lower(x, x).compile()
    jax.block_until_ready(program(x, x))
    start = time.perf_counter()
    for _ in range(20):
        product = program(x, x)
    jax.block_until_ready(product)
    return (time.perf_counter() - start) / 20, program.memory_analysis().temp_size_in_bytes


def measure(settings: Settings, ds: None) -> xr.Dataset:
    """The errors by type, what the operator costs, and J of one feature, samples in ascending order."""
    by_type = [errors(settings, dtype) for dtype in DTYPES]
    seconds, memory = operator_cost(settings.seed, settings.operator_samples)
    rng = np.random.default_rng(settings.seed)
    x = np.sort(settings.mean + settings.std * rng.normal(size=(settings.samples, 1)), axis=0)
    last = settings.scale, settings.epsilon, settings.mask
    with jax.enable_x64(True):
        J, spectrum = (np.asarray(form(x, *last)[0]) for form in (jacobian.dense, jacobian.spectrum))
        autodiff = jax.jacrev(lambda x: textbook(x, *last))(x)[:, 0, :, 0]
    return xr.Dataset(
        {
            "error": (("dtype", "form"), [[*found.values()] for found in by_type]),
            "operator_seconds": ((), seconds, {"units": "s"}),
            "operator_memory": ((), memory, {"units": "B"}),
            "jacobian": (("output", "input"), J),
            "spectrum": ("eigenvalue", spectrum),
            "autodiff_spectrum": ("eigenvalue", np.linalg.eigvalsh(autodiff)),
        },
        {"dtype": np.array(DTYPES, object), "form": np.array([*by_type[0]], object)},
    )


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Equal to rounding in float64."""
    # Autodiff of the textbook formula loses the digits that the mean has over the standard deviation.
    limit = 1e-12 * max(1, abs(settings.mean / settings.std)) ** 2
    double, single = (results.error.sel(dtype=dtype) for dtype in DTYPES)
    checks = [Check(f"{form}, float64", float(double.sel(form=form)), below=limit) for form in double.form.values]
    checks += [Check(f"{form}, float32", float(single.sel(form=form))) for form in single.form.values]
    name, dense = f"operator, N = {settings.operator_samples:,}, one feature", 4.0 * settings.operator_samples**2
    checks += [
        Check(f"{name}: time", 1e3 * float(results.operator_seconds), unit="ms"),
        Check(f"{name}: working memory", float(results.operator_memory) / 2**20, unit="MiB"),
        Check(f"{name}: memory of J itself", dense / 2**20, unit="MiB"),
    ]
    note = "Largest error, relative to the derivative's largest entry; autodiff of the textbook formula in float64."
    return [Finding("The closed forms are the derivatives of the formula.", checks=checks, note=note)]


def figure(results: xr.Dataset, settings: Settings):
    """J of one feature, and its eigenvalues beside numpy's."""
    from bnjax import plots

    title = f"N = {settings.samples}, scale = {settings.scale:g}, epsilon = {settings.epsilon:g}"
    arrays = (results[name].values for name in ("jacobian", "spectrum", "autodiff_spectrum"))
    return plots.jacobian(*arrays, title=title)


CLAIM = Claim(
    name="jacobian",
    question="Do the closed forms of batch normalization's derivatives agree with autodiff?",
    source="",
    settings=Settings,
    quick=Settings(),
    full=Settings(),
    tiny=Settings(samples=5, masked=1, operator_samples=100),
    measure=measure,
    judge=judge,
    figure=figure,
    must_hold=True,
)
