"""Is it batch normalization (BN), or any normalization? Norms x networks, trained from initializations of any scale.

    python -m experiments.norms                    # all claims
    python -m experiments.norms --claims=growth    # some

    doubled   the weights' own gradient when the weights are doubled
    growth    growth of the gradient per layer, theory against networks; which deep sigmoid networks train
    robust    the scales from which each norm trains, in fully connected, convolutional and residual networks

In `robust`, fully connected networks get Fashion-MNIST as it is; all others get it at 14 x 14 pixels. Expect some 12
minutes on 2 cores, half of it for compiling: all norms halve the gradient of doubled weights; at large scales all are
alike; at small ones norms over the batch train, and LayerNorm, GroupNorm and RMSNorm stop earlier.
"""

from collections.abc import Sequence
from typing import Any

from absl import app, flags

import bnjax
from bnjax import choices
from experiments import claim, norms

FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", "fashion_mnist_mini", f"One of {', '.join(bnjax.data.NAMES)}.")
flags.DEFINE_string("data_dir", None, "Where prepared data sets are kept. Default: the user's cache folder.")
flags.DEFINE_string("manual_dir", None, "Folder with a data set's original archives, instead of a download.")


def data(settings: Sequence[Any]) -> bnjax.Dataset:
    """The images; raises ValueError, naming the flag, for what they do not allow."""
    choices.check("--dataset", FLAGS.dataset, bnjax.data.NAMES)
    ds = bnjax.data.load(FLAGS.dataset, data_dir=FLAGS.data_dir, manual_dir=FLAGS.manual_dir)
    for one in settings:
        for field in ("batch_size", "image_batch_size", "deep_batch_size", "doubled_examples"):
            if getattr(one, field, 0) > len(ds.train_x):
                raise ValueError(f"--{field} must be at most {len(ds.train_x)}, got {getattr(one, field)}")
        if any(side % getattr(one, "pool", 1) for side in ds.train_x.shape[1:3]):
            raise ValueError(f"--pool must divide the images' {ds.train_x.shape[1:3]} pixels, got {one.pool}")
    return ds


main = claim.script("norms", norms.CLAIMS, data)

if __name__ == "__main__":
    app.run(main)
