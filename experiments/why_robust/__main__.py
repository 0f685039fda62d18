"""Why is a network with batch normalization (BN) robust to its initialization? Seven controls, trained on whole grids.

    python -m experiments.why_robust                        # all of them
    python -m experiments.why_robust --controls=dip,norms   # some

    frozen      features or a readout on random ones: which of them trains at extreme init scales?
    detached    is it enough to normalize forward, without the gradient through the batch statistics?
    evaluation  do running statistics fail where training does not?
    norms       how weights grow, what that does to their learning rate, and what weight decay does
    dip         the dip in accuracy near the smallest scale whose signals survive, and where training ends below it
    rates       does BN allow higher learning rates, and is it faster?
    depth       how deep a network still trains

Networks are small (64 units per layer, Fashion-MNIST at 7 x 7 pixels, and XOR in 49 dimensions), so that grids are
affordable. All controls take 4 minutes on 2 cores, and with --full some 8 times as long. Expect: features are learned
near scale 1, a readout does the work from 10 up; running statistics fail in short training; the dip is an overshoot of
the first steps; training ends where it takes longer than the run to escape from zero.
"""

from collections.abc import Sequence

import numpy as np
from absl import app, flags

import bnjax
from bnjax import choices
from experiments import claim, common, why_robust
from experiments.why_robust.common import Settings

FLAGS = flags.FLAGS
flags.DEFINE_integer("train_examples", None, "Use only this many training examples, the first ones. Default: all.")
flags.DEFINE_string("dataset", "fashion_mnist_mini", f"One of {', '.join(bnjax.data.NAMES)}.")
flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept. Default: the user's cache folder.")
flags.DEFINE_string("manual_dir", None, "Folder with a data set's original archives, instead of a download.")
flags.DEFINE_integer(
    "pool", 4, "Images are averaged over squares of this many pixels a side, which must divide theirs.", lower_bound=1
)

TEST_EXAMPLES = 1000  # the first of the test split


def data(settings: Sequence[Settings]) -> bnjax.Dataset:
    """The images, pooled and standardized.

    Raises:
      ValueError: naming the flag, for one that the data do not allow.
    """
    choices.check("--dataset", FLAGS.dataset, bnjax.data.NAMES)
    where = {name: FLAGS[name].value for name in ("data_dir", "manual_dir", "train_examples")}
    ds = bnjax.data.load(FLAGS.dataset, **where)
    for one in settings:
        for field in ("batch_size", "depth_batch_size"):
            if getattr(one, field, 0) > len(ds.train_x):
                raise ValueError(
                    f"--{field} must be at most the {len(ds.train_x)} training examples, got {getattr(one, field)}"
                )
    images, labels = pooled(ds.test_x[:TEST_EXAMPLES]), ds.test_y[:TEST_EXAMPLES]
    return bnjax.data.standardize(ds._replace(train_x=pooled(ds.train_x), test_x=images, test_y=labels))


def pooled(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, D]: the means over squares of --pool pixels a side."""
    _, height, width, _ = images.shape
    side = FLAGS.pool
    if height % side or width % side:
        raise ValueError(f"--pool must divide the images' {height} x {width} pixels, got {side}")
    return common.pooled(images, side).reshape(len(images), -1)


main = claim.script("why_robust", why_robust.CLAIMS, data, flag="controls")

if __name__ == "__main__":
    app.run(main)
