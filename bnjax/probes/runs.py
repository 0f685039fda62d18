"""Probes of a run, each state of which they measure along training."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.losses import cross_entropy
from bnjax.networks import as_model
from bnjax.probes.arrays import angle, norm
from bnjax.probes.backward import gradients
from bnjax.probes.forward import Signal, signals
from bnjax.probes.reading import form, kernels, shapes_of, with_kernels
from bnjax.types import RANGES, Dataset, Hyperparams, Model, Probe, Snapshot, bound, range_of, with_extra


def shapes(
    probe: Probe, model: Model, ds: Dataset, extra: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, jax.ShapeDtypeStruct]:
    """{quantity: the shape and type of what the probe measures}, without measuring.

    Raises:
      ValueError: if one is neither a scalar nor one figure a layer.
    """

    def measured(ds, hyper):
        state = bound(model, hyper.extra).init(jax.random.key(0), ds.train_x.shape[1:], hyper.init_scale)
        found = probe.measure(Snapshot(*state, *state, ds, hyper))
        return {name: jnp.asarray(value) for name, value in found.items()}

    hyper = {name: jax.ShapeDtypeStruct((), range_of(name).dtype) for name in (*RANGES, *extra)}
    found = jax.eval_shape(measured, ds, Hyperparams.from_named(hyper))
    for quantity, value in found.items():
        if value.shape not in ((), (len(probe.layers),)):
            raise ValueError(
                f"the probe's {quantity!r} must be a scalar or one figure for each of its layers "
                f"{tuple(probe.layers)}, got shape {value.shape}"
            )
    return found


def weights(
    model: Any,
    input_shape: tuple[int, ...],
    *,
    batch_size: int | None = None,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Probe:
    """A probe of each weight matrix W along training.

    weight_norm: |W|, the Frobenius norm. angle: between W and the initial W, in degrees.
    effective_learning_rate: learning_rate / |W|^2, the step size that counts where a norm hides |W|: there
    the angle a step turns W by does not depend on |W| and the learning rate otherwise (van Laarhoven 2017, section 3).
    gradient_norm, if there is a `batch_size`: |dL/dW| in training mode.

    Args:
      model: the network.
      input_shape: of one example.
      batch_size: the gradient is that of the first so many training examples. None: not measured.
      loss: of outputs [N, K] and labels [N], a scalar; by default the mean cross-entropy.
      extra: what the network takes as `Hyperparams.extra`; of a run its own values are used.

    Raises:
      ValueError: for a model without weight matrices, or a `batch_size` below 1; when it measures, for one above the
        number of training examples.
    """
    _check_batch_size(batch_size)
    model = as_model(model)
    state, reading, _ = form(bound(model, extra), input_shape)
    paths = reading.kernels
    names = tuple(kernels(*state, paths))
    if not names:
        raise ValueError("the model has no weight matrices: no product of x with a parameter")

    def measure(snapshot: Snapshot):
        state = (snapshot.params, snapshot.batch_stats)
        now = kernels(*state, paths)
        start = kernels(snapshot.initial_params, snapshot.initial_batch_stats, paths)
        norms = jnp.stack([norm(now[name]) for name in names])
        angles = jnp.stack([angle(now[name], start[name]) for name in names])
        rate = snapshot.hyper.learning_rate / norms / norms
        measured = {"weight_norm": norms, "angle": angles, "effective_learning_rate": rate}
        if batch_size is None:
            return measured
        x, y = _first_examples(snapshot, batch_size)

        def loss_of(matrices):
            outputs, _ = bound(model, snapshot.hyper.extra).apply(*with_kernels(*state, matrices), x, train=True)
            return with_extra(loss, snapshot.hyper.extra)(outputs, y)

        to_weights = jax.grad(loss_of)(now)
        return measured | {"gradient_norm": jnp.stack([norm(to_weights[name]) for name in names])}

    return Probe(measure, names)


def flow(
    model: Any,
    input_shape: tuple[int, ...],
    *,
    batch_size: int = 128,
    loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Probe:
    """A probe of each intermediate along training: what `signals` has, and gradient_norm, that of the loss to it.

    Both in training mode, on the first training examples.

    Args:
      model: the network.
      input_shape: of one example.
      batch_size: the number of examples.
      loss: of outputs [N, K] and labels [N], a scalar; by default the mean cross-entropy.
      extra: what the network takes as `Hyperparams.extra`; of a run its own values are used.

    Raises:
      ValueError: for a `batch_size` below 1; when it measures, for one above the number of training examples.
    """
    _check_batch_size(batch_size)
    model = as_model(model)
    state, _, x = form(bound(model, extra), input_shape)
    names = tuple(shapes_of(bound(model, extra), *state, x, True))

    def measure(snapshot: Snapshot):
        x, y = _first_examples(snapshot, batch_size)
        network, extra = (model, snapshot.params, snapshot.batch_stats, x), snapshot.hyper.extra
        found = signals(*network, extra=extra)
        own_loss = with_extra(loss, extra)
        norms = gradients(*network, lambda outputs: own_loss(outputs, y), extra=extra).intermediates
        measured = {
            quantity: jnp.stack([getattr(found[name], quantity) for name in names]) for quantity in Signal._fields
        }
        return measured | {"gradient_norm": jnp.stack([norms[name] for name in names])}

    return Probe(measure, names)


def _check_batch_size(batch_size):
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _first_examples(snapshot, batch_size):
    x, y = snapshot.ds.train_x, snapshot.ds.train_y
    if batch_size > len(x):
        raise ValueError(f"a probe's batch_size must be at most the {len(x)} training examples, got {batch_size}")
    return jnp.asarray(x[:batch_size]), jnp.asarray(y[:batch_size])
