"""`flax.nnx.BatchNorm`, computed by `bnjax.batch_norm.apply`."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from bnjax.interop.flax import apply, check_options, feature_axes
from bnjax.types import BatchNormParams


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, computed by `bnjax.batch_norm.apply`: right for inputs far from zero, too.

    To use it, change one line: `from bnjax.interop.nnx import BatchNorm`. Arguments, initialization and state are
    Flax's. The differences are those of `bnjax.interop.flax.BatchNorm`.
    """

    def __call__(self, x, use_running_average: bool | None = None, *, mask: ArrayLike | None = None):
        """Normalizes x [N, ..., C], by its own statistics or the running ones.

        Args:
          x: with the features on `self.axis`.
          use_running_average: in the place of the attribute: True in evaluation, False in training, which updates
            `self.mean` and `self.var`.
          mask: true for valid entries; broadcasts against `x`, with size 1 on the feature axis.

        Returns:
          y, of the shape of x; its dtype is `self.dtype`, or that of x, parameters and statistics together.

        Raises:
          ValueError: if shapes do not fit, for `axis_index_groups`, and for `momentum=None`.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError("use_running_average is given neither to BatchNorm nor to the call")
        check_options(self)
        mean, var = self.mean[...], self.var[...]
        params = (p if p is None else p[...] for p in (self.scale, self.bias))
        # The statistics go through it, too, for their say in the dtype; those used stay as they are stored.
        x, _, _, scale, bias = self.promote_dtype((jnp.asarray(x), mean, var, *params), dtype=self.dtype)
        y, stats = apply(
            BatchNormParams(scale, bias),
            mean,
            var,
            x,
            dtype=nnx.nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
            train=not use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis=feature_axes(x, self.axis),
            mask=mask,
            axis_name=self.axis_name,
        )
        if not use_running_average:
            self.mean[...], self.var[...] = stats.mean, stats.var
        return y
