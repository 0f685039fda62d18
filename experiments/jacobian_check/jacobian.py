"""The closed forms of training mode and what autodiff makes of the textbook formula."""

import dataclasses
import math
import timeit

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from bnjax import activations, batch_norm, choices, jacobian, plots
from bnjax.findings import Check, Finding
from experiments.claim import Claim
from experiments.settings import at_least, positive, require, setting

FEATURES = 4
DTYPES = ("float64", "float32")
FORMS = (
    "dense against jacrev",
    "operator against jacrev times a vector",
    "spectrum against eigvalsh of jacrev",
    "jacfwd of normalize against jacrev",
    "jacrev of normalize against jacrev",
    "Hessian-vector product against hessian times a vector",
    "block, to x against jacrev",
    "block, to W against jacrev",
)


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
        choices.check("--activation", self.activation, activations.ACTIVATIONS, activations.ALIASES)

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
    """The arrays of `FORMS`, by `bnjax.jacobian` and the rule of `bnjax.batch_norm`."""

    def layer(x):
        return scale * batch_norm.normalize(x, epsilon, mask=mask)

    block, given = jacobian.block(x, kernel, scale, 0.0, phi, epsilon, mask), (epsilon, mask)
    by_hand = (
        jacobian.dense(x, scale, *given),
        jacobian.matvec(x, scale, dx, *given),
        jacobian.spectrum(x, scale, *given),
    )
    by_rule = jax.jacfwd(layer)(x), jax.jacrev(layer)(x)
    return *by_hand, *by_rule, jacobian.hvp(x, a, dx, *given), block.x, block.kernel


def references(x, a, dx, kernel, scale, epsilon, mask, phi):
    """The arrays of `FORMS` with the derivatives that they are made of, by autodiff of the textbook formula."""

    def weighted(x):
        return (jnp.where(mask, a, 0) * textbook(x, 1.0, epsilon, mask)).sum()

    def layer(x, kernel):
        return phi(textbook(jnp.matmul(x, kernel, precision="highest"), scale, epsilon, mask))

    full = jax.jit(jax.jacrev(lambda x: textbook(x, scale, epsilon, mask)))(x)  # [N, C, N, C]
    hessian = jax.jit(jax.hessian(weighted))(x)
    to_x, to_kernel = jax.jit(jax.jacrev(layer, argnums=(0, 1)))(x, kernel)
    J, to_kernel = jnp.einsum("icjc->cij", full), jnp.einsum("ifdf->ifd", to_kernel)
    product, second = jnp.einsum("cij,jc->ic", J, dx), jnp.einsum("icjd,jd->ic", hessian, dx)
    of_J = [(one, J) for one in (J, product, np.linalg.eigvalsh(J), full, full)]
    return *of_J, (second, hessian), (to_x, to_x), (to_kernel, to_kernel)


def errors(settings: Settings, dtype: str) -> list[float]:
    """Of `FORMS`, the largest error relative to the derivative's largest entry; samples are of that type.

    The reference is in float64, from the same samples.
    """
    rng, n = np.random.default_rng(settings.seed), settings.samples
    x = (settings.mean + settings.std * rng.normal(size=(n, FEATURES))).astype(dtype)
    a, dx = rng.normal(size=(2, n, FEATURES)).astype(dtype)
    arrays = x, a, dx, rng.normal(size=(FEATURES, FEATURES)).astype(dtype), np.full(FEATURES, settings.scale, dtype)
    last = settings.epsilon, settings.mask, activations.get(settings.activation)
    with jax.enable_x64(dtype == "float64"):
        found = jax.tree.map(np.asarray, jax.jit(lambda *arrays: closed_forms(*arrays, *last))(*arrays))
    with jax.enable_x64(True):
        expected = references(*(np.asarray(array, "float64") for array in arrays), *last)
    return [
        float(np.abs(form - np.asarray(value)).max() / max(np.abs(np.asarray(derivative)).max(), 1e-300))
        for form, (value, derivative) in zip(found, expected, strict=True)
    ]


def measure(settings: Settings, ds: None) -> xr.Dataset:
    """The errors by type, what the operator costs for one feature, and J of one, samples in ascending order."""
    x = jax.random.normal(jax.random.key(settings.seed), (settings.operator_samples, 1))
    program = jax.jit(lambda x, dx: jacobian.matvec(x, 1.0, dx)).lower(x, x).compile()
    program(x, x).block_until_ready()
    seconds = timeit.timeit(lambda: program(x, x).block_until_ready(), number=20) / 20
    x = np.random.default_rng(settings.seed).normal(size=(settings.samples, 1))
    x, last = np.sort(settings.mean + settings.std * x, axis=0), (settings.scale, settings.epsilon, settings.mask)
    with jax.enable_x64(True):
        J, spectrum = (np.asarray(form(x, *last)[0]) for form in (jacobian.dense, jacobian.spectrum))
        autodiff = jax.jacrev(lambda x: textbook(x, *last))(x)[:, 0, :, 0]
    return xr.Dataset(
        {
            "error": (("dtype", "form"), [errors(settings, dtype) for dtype in DTYPES]),
            "operator_seconds": ((), seconds, {"units": "s"}),
            "operator_memory": ((), program.memory_analysis().temp_size_in_bytes, {"units": "B"}),
            "jacobian": (("output", "input"), J),
            "spectrum": ("eigenvalue", spectrum),
            "autodiff_spectrum": ("eigenvalue", np.linalg.eigvalsh(autodiff)),
        },
        {"dtype": np.array(DTYPES, object), "form": np.array(FORMS, object)},
    )


def judge(results: xr.Dataset, settings: Settings) -> list[Finding]:
    """Equal to rounding in float64."""
    # Autodiff of the textbook formula loses the digits that the mean has over the standard deviation.
    bounds = {"float64": {"below": 1e-12 * max(1, abs(settings.mean / settings.std)) ** 2}, "float32": {}}
    checks = [
        Check(f"{form}, {dtype}", float(results.error.sel(dtype=dtype, form=form)), **bound)
        for dtype, bound in bounds.items()
        for form in FORMS
    ]
    name, dense = f"operator, N = {settings.operator_samples:,}, one feature", 4.0 * settings.operator_samples**2
    checks += [
        Check(f"{name}: time", 1e3 * float(results.operator_seconds), unit="ms"),
        Check(f"{name}: working memory", float(results.operator_memory) / 2**20, unit="MiB"),
        Check(f"{name}: memory of J itself", dense / 2**20, unit="MiB"),
    ]
    note = "Largest error, relative to the derivative's largest entry; autodiff of the textbook formula in float64."
    return [Finding("The closed forms are the derivatives of the formula.", checks=checks, note=note)]


def draw(results: xr.Dataset, settings: Settings) -> plots.Figure:
    """J of one feature, and its eigenvalues beside numpy's."""
    title = f"N = {settings.samples}, scale = {settings.scale:g}, epsilon = {settings.epsilon:g}"
    arrays = (results[name].values for name in ("jacobian", "spectrum", "autodiff_spectrum"))
    return plots.jacobian(*arrays, title=title)


CLAIM = Claim(
    name="jacobian",
    question="Do the closed forms of batch normalization's derivatives agree with autodiff?",
    source="",
    settings=Settings, quick=Settings(), full=Settings(), tiny=Settings(samples=5, masked=1, operator_samples=100),
    measure=measure, judge=judge, figure=draw, must_hold=True,
)  # fmt: skip
