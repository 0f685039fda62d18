"""Group normalization (Wu & He 2018): each example, and each group of its channels, by its own mean and variance.

    y = scale (x - mean) / sqrt(var + epsilon) + bias, mean and variance over the positions and channels of a group

One group is layer normalization, groups of one channel are instance normalization (which needs positions). The
paper's default is 32 groups, or 16 channels in each; Flax has 32 groups, PyTorch no default.
"""

from jax.typing import ArrayLike

from bnjax import batch_norm, choices
from bnjax.norms import common
from bnjax.theory import norm_growth
from bnjax.types import Norm


def group(*, group_size: int | None = None, num_groups: int | None = None, epsilon: ArrayLike = 1e-5) -> Norm:
    """Group normalization.

    Args:
      group_size: channels of a group; without `num_groups` either, 16.
      num_groups: groups of a layer. At most one of the two is given.
      epsilon: added to the variance, >= 0.

    Raises:
      ValueError: if both are given, or a value is out of range. Where the size does not divide the channels, `apply`
        raises it, when traced.
    """
    batch_norm.check_epsilon(epsilon)
    if group_size is not None and num_groups is not None:
        raise ValueError(f"at most one of group_size and num_groups: got {group_size} and {num_groups}")
    if group_size is None and num_groups is None:
        group_size = 16
    sizes = {"group_size": group_size} if num_groups is None else {"num_groups": num_groups}
    for name, value in sizes.items():
        choices.check_count(name, value)

    def groups_of(channels):
        if num_groups is not None:
            count, given = num_groups, f"num_groups={num_groups}"
        else:
            count, given = channels // group_size, f"group_size={group_size}"
        if count == 0 or channels % count or (group_size is not None and channels % group_size):
            raise ValueError(f"{given} does not divide the {channels} features of the layer")
        return count

    def init(shape):
        groups_of(shape[-1])
        return common.affine_init(shape[-1]), {}

    def apply(params, stats, x, *, train, mask=None):
        standard = common.standardize_examples(x, epsilon, groups_of(x.shape[-1]), mask)
        return common.affine(params, standard, x.dtype), stats

    def growth(activation, num_features=None, batch_size=None):
        if num_features is None and group_size is None:
            return None  # it is that of the layer's width over num_groups
        return norm_growth.growth("group", activation, num_features=num_features or group_size)

    return Norm(init, apply, growth=growth, config={"norm": "group", **sizes, "epsilon": common.number(epsilon)})
