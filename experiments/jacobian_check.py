"""The Jacobian of batch normalization: its closed form, its spectrum, and JAX's automatic derivatives of the formula.

    python -m experiments.jacobian_check

compares what `bnjax.jacobian` has for training mode with jax.jacrev, jax.hessian and numpy's eigenvalues of the
textbook formula, in float64 and float32; shows what the operator costs for a batch of 65,536; and draws one
feature's J. Expect errors near 1e-15 in float64 and 1e-7 in float32. Takes some 10 seconds, most of it compilation.
"""

import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.table import Table

from bnjax import activations, batch_norm, jacobian
from experiments import common

FLAGS = flags.FLAGS

flags.DEFINE_integer("samples", 12, "N, the size of the batch whose Jacobian is formed.", lower_bound=1)
flags.DEFINE_integer("masked", 0, "How many of the samples are masked.", lower_bound=0)
flags.DEFINE_float("mean", 1.0, "Of the samples, which are drawn from a normal distribution.")
flags.DEFINE_float("std", 1.0, "Of the samples.")
flags.DEFINE_float("scale", 1.5, "Batch normalization's scale.")
flags.DEFINE_float(
    "epsilon", 0.1, "Batch normalization's epsilon; large by default, to be seen in the spectrum."
)
flags.DEFINE_string(
    "activation", "tanh", f"Of the block activation(BN(x W)): {', '.join(activations.ACTIVATIONS)}."
)
flags.DEFINE_integer("seed", 0, "Draws samples and weights.", lower_bound=0)
flags.DEFINE_integer("operator_samples", 65_536, "N for the operator's time and memory.", lower_bound=1)
flags.DEFINE_string("out", "results/jacobian_check", "Output folder.")

SCRIPT, FIGURE = "jacobian_check", "jacobian.png"
FEATURES = 4


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
    by_jacrev = {
        "dense": ("jax.jacrev", J),
        "operator": ("jax.jacrev, times a vector", jnp.einsum("cij,jc->ic", J, dx)),
        "spectrum": ("numpy.linalg.eigvalsh of jax.jacrev", np.linalg.eigvalsh(J)),
        "jacfwd of normalize": ("jax.jacrev", full),
        "jacrev of normalize": ("jax.jacrev", full),
    }
    vector = jnp.einsum("icjd,jd->ic", hessian, dx)
    return {
        **{name: (means, value, jnp.abs(J).max()) for name, (means, value) in by_jacrev.items()},
        "Hessian-vector product": ("jax.hessian, times a vector", vector, jnp.abs(hessian).max()),
        "block, to x": ("jax.jacrev", block_x, jnp.abs(block_x).max()),
        "block, to W": ("jax.jacrev", jnp.einsum("ifdf->ifd", block_kernel), jnp.abs(block_kernel).max()),
    }


def comparisons(dtype: str) -> dict[str, tuple[str, float]]:
    """{what: (compared with, error)}: the largest error relative to the derivative's largest entry.

    The reference is in float64, from the same samples.
    """
    rng = np.random.default_rng(FLAGS.seed)
    n = FLAGS.samples
    x = (FLAGS.mean + FLAGS.std * rng.normal(size=(n, FEATURES))).astype(dtype)
    a, dx = rng.normal(size=(2, n, FEATURES)).astype(dtype)
    kernel = rng.normal(size=(FEATURES, FEATURES)).astype(dtype)
    scale = np.full(FEATURES, FLAGS.scale, dtype)
    mask = np.arange(n)[:, None] >= FLAGS.masked
    phi = activations.get(FLAGS.activation)
    with jax.enable_x64(dtype == "float64"):
        forms = jax.jit(lambda *arrays: closed_forms(*arrays, FLAGS.epsilon, mask, phi))
        found = jax.tree.map(np.asarray, forms(x, a, dx, kernel, scale))
    with jax.enable_x64(True):
        exact = (np.asarray(array, "float64") for array in (x, a, dx, kernel, scale))
        expected = references(*exact, FLAGS.epsilon, mask, phi)
    return {
        name: (means, float(np.abs(found[name] - np.asarray(value)).max() / max(float(unit), 1e-300)))
        for name, (means, value, unit) in expected.items()
    }


def operator_cost(samples: int) -> tuple[float, float, float]:
    """Of J times a vector for one feature: seconds, and bytes of working memory; and the bytes J would have."""
    x = jax.random.normal(jax.random.key(FLAGS.seed), (samples, 1))
    program = jax.jit(lambda x, dx: jacobian.matvec(x, 1.0, dx)).lower(x, x).compile()
    jax.block_until_ready(program(x, x))
    start = time.perf_counter()
    for _ in range(20):
        product = program(x, x)
    jax.block_until_ready(product)
    memory = program.memory_analysis().temp_size_in_bytes
    return (time.perf_counter() - start) / 20, memory, 4.0 * samples**2


def draw():
    """The figure: J of one feature, samples in ascending order, and its eigenvalues beside numpy's."""
    from bnjax import plots

    rng = np.random.default_rng(FLAGS.seed)
    x = np.sort(FLAGS.mean + FLAGS.std * rng.normal(size=(FLAGS.samples, 1)), axis=0)
    mask = (np.arange(FLAGS.samples) >= FLAGS.masked)[:, None]
    with jax.enable_x64(True):
        J = jacobian.dense(x, FLAGS.scale, FLAGS.epsilon, mask)[0]
        spectrum = jacobian.spectrum(x, FLAGS.scale, FLAGS.epsilon, mask)[0]
        autodiff = jax.jacrev(lambda x: textbook(x, FLAGS.scale, FLAGS.epsilon, mask))(x)[:, 0, :, 0]
        title = f"N = {FLAGS.samples}, scale = {FLAGS.scale:g}, epsilon = {FLAGS.epsilon:g}"
        return plots.jacobian(np.asarray(J), np.asarray(spectrum), np.linalg.eigvalsh(autodiff), title=title)


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> comparisons -> table, figure."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    try:
        common.check_arguments(argv)
        activations.get(FLAGS.activation)
        if FLAGS.masked >= FLAGS.samples:
            raise ValueError(f"--masked={FLAGS.masked} leaves none of --samples={FLAGS.samples}")
        for flag in ("mean", "std", "scale"):
            if not math.isfinite(FLAGS[flag].value):
                raise ValueError(f"--{flag} must be finite, got {FLAGS[flag].value}")
        if FLAGS.std <= 0:
            raise ValueError(f"--std must be above 0, got {FLAGS.std}")
        if not 0 < FLAGS.epsilon < math.inf:
            raise ValueError(f"--epsilon must be above 0 and finite, got {FLAGS.epsilon}")
        common.check_out(folder, SCRIPT, FIGURE)
        figure = common.save(draw(), folder / FIGURE, SCRIPT)
    except (ValueError, OSError, ImportError) as error:
        raise common.fail(str(error)) from None
    double, single = comparisons("float64"), comparisons("float32")
    table = Table(title="Largest error, relative to the largest entry of the derivative")
    for column in ("closed form", "compared with, for the textbook formula in float64", "float64", "float32"):
        table.add_column(column, justify="right" if column.startswith("float") else "left")
    for name, (against, error) in double.items():
        table.add_row(name, against, f"{error:.0e}", f"{single[name][1]:.0e}")
    common.console().print(table)
    seconds, memory, dense = operator_cost(FLAGS.operator_samples)
    print(
        f"J times a vector, N = {FLAGS.operator_samples:,}, one feature: {1e3 * seconds:.2f} ms, "
        f"{memory / 2**20:.2g} MiB of working memory; J itself would have {dense / 2**20:,.4g} MiB."
    )
    print(f"Figure: {figure}")
    # Autodiff of the textbook formula loses the digits that the mean has over the standard deviation.
    limit = 1e-12 * max(1, abs(FLAGS.mean / FLAGS.std)) ** 2
    if max(error for _, error in double.values()) > limit:
        raise common.fail(f"a closed form differs from autodiff by more than {limit:.0e} in float64")


if __name__ == "__main__":
    app.run(main)
