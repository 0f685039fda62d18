"""To and from Flax: variables of a BN layer and of an mlp; modules as models; `BatchNorm` in the place of Flax's own.

    BN layer    {"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}, as `flax.linen.BatchNorm` has it
    mlp         hidden_i's kernel and bias are Dense_i's, its norm is BatchNorm_i; the output layer of a network with L
                hidden ones is Dense_L. These are the names that Flax gives to the layers of an
                `nn.compact` network by itself, whatever the order of norm and activation.

Both average the batches' biased variances and weigh the OLD running value with `momentum`, so that both continue
the statistics the same way. Flax's momentum is 0.99 by default, the mlp's is 0.9. Flax keeps no count of
batches: without one, `momentum=None` and `debias` begin anew.

Flax has no frozen parameters: a frozen kernel goes to "params", and Flax's user leaves it out of the optimizer.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

try:
    from flax import linen as nn
    from flax.errors import InvalidRngError
    from flax.traverse_util import flatten_dict, unflatten_dict
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; bnjax.interop.flax needs the extra bnjax[interop]") from error

from bnjax import batch_norm
from bnjax.interop import entries, functions
from bnjax.types import BatchNormParams, BatchStats, Model, PyTree, some_of, takes_extra, taking_extra

COLLECTIONS = ("params", "batch_stats")
RNG = "random numbers"  # the entry of the state that holds their key; no submodule can have this name


def to_flax(params: BatchNormParams, stats: BatchStats) -> dict[str, dict[str, Any]]:
    """The variables of a `flax.linen.BatchNorm`.

    Args:
      params: scale and bias, [C] (or the shape of several feature axes); None for one that is not used.
      stats: running mean and variance, likewise. The count is left out: Flax has none.

    Returns:
      `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`, without what is not used. Nothing is copied.
    """
    used = {name: value for name, value in params._asdict().items() if value is not None}
    variables = {"params": used, "batch_stats": {"mean": stats.mean, "var": stats.var}}
    return {collection: values for collection, values in variables.items() if values}


def from_flax(variables: Mapping[str, Any], count: ArrayLike = 0) -> tuple[BatchNormParams, BatchStats]:
    """The parameters and statistics in the variables of a `flax.linen.BatchNorm`.

    Args:
      variables: as `to_flax` returns them. Other collections are ignored.
      count: the batches that the statistics have seen; only `momentum=None` and `debias` need it. With the
        default, their next batch replaces the statistics.

    Returns:
      Parameters (None for one that is not there) and statistics, of the shapes and dtypes given (float64 only
      with x64 on, as everywhere in JAX).

    Raises:
      ValueError: for a missing or unexpected entry, or one of another shape than the mean's.
    """
    given = _flat(variables)
    shape = np.shape(given.get("batch_stats/mean", given.get("batch_stats/var")))
    used = [name for name in ("params/scale", "params/bias") if name in given]
    expected = dict.fromkeys([*used, "batch_stats/mean", "batch_stats/var"], shape)
    entries.check("the variables of a Flax BatchNorm", given, expected)
    given = {name: jnp.asarray(value) for name, value in given.items()}
    return (
        BatchNormParams(given.get("params/scale"), given.get("params/bias")),
        BatchStats(given["batch_stats/mean"], given["batch_stats/var"], jnp.asarray(count, jnp.int32)),
    )


def mlp_to_flax(model: Model, params: PyTree, batch_stats: PyTree) -> dict[str, Any]:
    """The variables of a Flax network of `Dense` and `BatchNorm` layers that computes what the mlp does.

    Args:
      model: from `bnjax.mlp`.
      params: of `model`, or a gradient with respect to them.
      batch_stats: of `model`.

    Returns:
      `{"params": {"Dense_0": {"kernel", "bias"?}, "BatchNorm_0": {"scale", "bias"}, ...}, "batch_stats":
      {"BatchNorm_0": {"mean", "var"}, ...}}`; without norms there are no "batch_stats". Nothing is copied.

    Raises:
      ValueError: if the parameters or statistics are not those of `model`.
    """
    given = entries.checked(model, params, batch_stats)
    names = _flax_names(model, given)
    return unflatten_dict({names[name]: value for name, value in given.items() if name in names}, sep="/")


def mlp_from_flax(model: Model, variables: Mapping[str, Any], count: ArrayLike = 0) -> tuple[PyTree, PyTree]:
    """The parameters and statistics of an mlp in the variables of a Flax network of `Dense` and `BatchNorm` layers.

    Args:
      model: from `bnjax.mlp`, of the same layers. It has a bias in its hidden layers (`use_bias=True`) if the
        Flax network has.
      variables: as `mlp_to_flax` returns them. Other collections are ignored.
      count: the batches that the statistics have seen; needed only if the model's momentum is None.

    Returns:
      `(params, batch_stats)` as `model.apply` takes them, of the dtypes given (float64 only with x64 on).

    Raises:
      ValueError: if `variables` do not fit `model`; the message lists what is missing, unexpected or ill-shaped.
    """
    given = _flat(variables)
    fan_in = (np.shape(given.get("params/Dense_0/kernel")) or (1,))[0]
    shapes = entries.shapes(model, fan_in)
    names = _flax_names(model, shapes)
    expected = {theirs: shapes[ours] for ours, theirs in names.items()}
    entries.check("the variables of a Flax network", given, expected)
    count = jnp.asarray(count, jnp.int32)
    return entries.build(model, fan_in, lambda name: given[names[name]] if name in names else count)


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`, computed by `bnjax.batch_norm.apply`: right for inputs far from zero, too.

    To use it, change one line: `from bnjax.interop.flax import BatchNorm`. Arguments, initialization and variables are
    Flax's, and so existing checkpoints load. The differences:

    - Statistics are always taken in two passes and in float32 at least: `use_fast_variance` changes nothing, and of
      `force_float32_reductions=False` only the dtype of the stored statistics is left.
    - `mask` must have size 1 on the feature axis. Masked outputs are the bias, masked inputs may be NaN, and in
      evaluation the mask counts, too.
    - A batch without a valid entry leaves the statistics as they are, one of a single entry leaves the variance
      (and at least one axis besides the features must exist, or `axis_name`). With `axis_name` each valid
      entry counts once; in Flax each device does.
    - The statistics keep their dtype, and no gradient flows through them.
    - No `axis_index_groups`, no complex numbers; and no `momentum=None`, which would need a count of batches.
    """

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalizes x [N, ..., C], by its own statistics or the running ones.

        Args:
          x: with the features on `self.axis`.
          use_running_average: here or as an attribute: True in evaluation, False in training, which updates
            "batch_stats" unless the module is being initialized.
          mask: true for valid entries; broadcasts against `x`, with size 1 on the feature axis.

        Returns:
          y, of the shape of x; its dtype is `self.dtype`, or that of x and the parameters together.

        Raises:
          ValueError: if shapes do not fit, for `axis_index_groups`, and for `momentum=None`.
        """
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        check_options(self)
        x = jnp.asarray(x)
        axis = feature_axes(x, self.axis)
        shape = [x.shape[a] for a in axis]
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        # Scale first, as in Flax: the order of the draws.
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        initializing = self.is_initializing()
        y, stats = apply(
            BatchNormParams(scale, bias),
            mean.value,
            var.value,
            # `axis_name` need not exist yet, so that the single example of a `vmap` may come alone.
            x[None] if initializing else x,
            dtype=nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
            train=not use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis=axis,
            mask=mask,
            axis_name=None if initializing else self.axis_name,
        )
        if initializing:
            return y[0]
        if not use_running_average:
            mean.value, var.value = stats.mean, stats.var
        return y


def apply(params, mean, var, x, *, dtype, train, mask, **options) -> tuple[Any, BatchStats]:
    """`batch_norm.apply` as Flax's modules need it: any mask and x, no count, y of the given dtype."""
    # What is narrower than the result or float32 would be rounded on the way.
    x = x.astype(jnp.promote_types(x.dtype, jnp.promote_types(dtype, jnp.float32)))
    mask = None if mask is None else jnp.asarray(mask, bool)
    stats = BatchStats(mean, var, count=jnp.int32(0))
    y, stats = batch_norm.apply(params, stats, x, train=train, mask=mask, **options)
    return y.astype(dtype), stats


def check_options(module) -> None:
    """Raises a ValueError for an attribute of Flax's BatchNorm that is not supported."""
    if module.axis_index_groups is not None:
        raise ValueError("axis_index_groups is not supported; name several axes in axis_name instead")
    if module.momentum is None:
        raise ValueError("momentum=None needs a count of batches, which Flax's variables lack; use bnjax.batch_norm")


def feature_axes(x, axis) -> tuple[int, ...]:
    """The feature axes, negative and in ascending order, so that they hold for x[None], too."""
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    return tuple(sorted(a - x.ndim if a >= 0 else a for a in axes))


def _flat(variables):
    """The entries of the two collections by name, such as `params/Dense_0/kernel`."""
    return flatten_dict({c: variables[c] for c in COLLECTIONS if c in variables}, sep="/")


def _flax_names(model, names):
    """Flax's name of each entry of an mlp but the counts."""
    flax_names = {}
    for name in names:
        layer, part, leaf = entries.dense_and_norm(model, name)
        collection = "batch_stats" if leaf in ("mean", "var") else "params"
        if leaf != "count":
            flax_names[name] = f"{collection}/{'Dense' if part == 'dense' else 'BatchNorm'}_{layer}/{leaf}"
    return flax_names


def as_model(
    module: nn.Module,
    *,
    scaled: Collection[str] | None = None,
    arguments: Callable[[bool], Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """A Flax module as a `bnjax.Model`, to be swept and probed like any other.

    Args:
      module: called with a batch x [N, ...], gives outputs [N, K]. It has the collections "params" and, if any,
        "batch_stats". If it asks for random numbers in training (dropout), their key is part of its state: drawn
        from the seed, and split at each step. In evaluation there are none.
      scaled: the kernels that `init_scale` multiplies, by path, or the submodules that have them. None: all but those
        of the readouts (`bnjax.tracing`).
      arguments: the keyword arguments of the module in training (True) and evaluation (False). None: those of `train`,
        `training`, `is_training`, `deterministic` and `use_running_average` that its `__call__` has.
      config: identifies the network in stored results. None: the class and attributes of the module, and of modules
        among these. Functions count by name, so those that are defined in place need a `config`.

    Returns:
      `Model`. Its `init` raises a ValueError for a name in `scaled` without kernels, and for other collections; all
      its functions do for a module that takes other arguments, or asks for random numbers in evaluation.
    """
    given = arguments or functions.arguments(type(module).__call__)

    takes = takes_extra(type(module).__call__) and "extra" not in given(False)

    def call(function, *args, train, extra, **options):
        own = {"extra": extra} if takes else {}
        try:
            return function(*args, **own, **given(train), **options)
        except InvalidRngError as error:
            raise AsksForRandomNumbers(
                f"{type(module).__name__} asks for random numbers in evaluation, too; turn dropout and the like off by "
                f"arguments=lambda train: {{...}} ({error})"
            ) from error
        except TypeError as error:
            if not re.search(r"__call__\(\) (got an unexpected keyword argument|missing)", str(error)):
                raise
            raise ValueError(
                f"{type(module).__name__} was called with x and {given(train) or 'nothing else'}: {error}. `arguments` "
                "says what a module takes beside x: arguments=lambda train: {} if nothing"
            ) from error

    def variables_of(key, input_shape, extra):
        errors = []
        for dtype in (jnp.float32, jnp.int32):  # tokens
            x = jnp.zeros((1, *input_shape), dtype)
            try:
                return dict(call(module.init, key, x, train=False, extra=extra)), x
            except (TypeError, ValueError) as error:
                errors.append(error)
        raise errors[0]

    @functools.cache
    def random(input_shape, names):
        """True if it asks for random numbers in training; `names` are those in `extra`."""
        extra = some_of(names)
        variables, x = jax.eval_shape(lambda: variables_of(jax.random.key(0), input_shape, extra))

        def apply(variables, x):
            return call(module.apply, variables, x, train=True, extra=extra, mutable=["batch_stats"])

        try:
            jax.eval_shape(apply, variables, x)
        except AsksForRandomNumbers:
            return True
        return False

    def init(key, input_shape, *, extra):
        variables, _ = variables_of(key, input_shape, extra)
        variables.pop("perturbations", None)
        variables.pop("intermediates", None)
        unknown = set(variables) - set(COLLECTIONS)
        if unknown:
            raise ValueError(f"collections must be {' and '.join(COLLECTIONS)}, the module has {sorted(unknown)} too")
        params, state = variables.get("params", {}), variables.get("batch_stats", {})
        if random(tuple(input_shape), tuple(extra)):
            state = {**state, RNG: functions.dropout_key(key)}
        return params, state

    def apply(params, batch_stats, x, *, train, extra):
        variables = {"params": params, "batch_stats": {n: v for n, v in batch_stats.items() if n != RNG}}
        if not train:
            return call(module.apply, variables, x, train=False, extra=extra), batch_stats
        options, kept = {}, {}
        if RNG in batch_stats:
            kept[RNG], now = functions.next_keys(batch_stats[RNG])
            options["rngs"] = {"params": now}  # streams without a key of their own take that of "params"
        options["mutable"] = ["batch_stats"]
        outputs, new = call(module.apply, variables, x, train=True, extra=extra, **options)
        return outputs, {**new.get("batch_stats", variables["batch_stats"]), **kept}

    if config is None:
        config = functions.in_words(scaled, model="flax", module=_description(module))
    init, apply = (taking_extra(function, takes) for function in (init, apply))
    return functions.as_model(init, apply, scaled=scaled, config=config)


class AsksForRandomNumbers(ValueError):
    """A module that needs a key where there is none."""


def _description(value):
    """A module, and what is in its attributes, as JSON holds it; without addresses in memory."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_description(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _description(one) for name, one in value.items()}
    if isinstance(value, nn.Module):
        names = [field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name")]
        attributes = {name: _description(getattr(value, name, None)) for name in names}
        return {"class": type(value).__qualname__, **attributes}
    if isinstance(value, np.ndarray | jax.Array):  # its repr leaves out the middle
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
