"""What a process does that has none of the packages of `bnjax[data]`."""

import hashlib
import sys

import numpy as np

from bnjax import data


def check():
    extra = {"tensorflow_datasets", "array_record", "importlib_resources", "tensorflow"}
    assert not extra & set(sys.modules), extra & set(sys.modules)
    sys.modules.update(dict.fromkeys(extra))  # importing one is an ImportError
    print(hashlib.sha256(b"".join(a.tobytes() for a in data.load())).hexdigest())
    ds = data.standardize(data.Dataset(np.eye(3), np.arange(3), np.eye(3), np.arange(3)))
    print(ds.train_x.dtype)
    for name in data.NAMES[1:]:
        try:
            data.load(name)
        except ImportError as error:
            print(f"loading {name} needs the extra `bnjax[data]`" in str(error))
    sys.stdout.flush()
