"""Makes the embedded data set from the official archives of Fashion-MNIST.

    python -m bnjax.data.make_fashion_mnist_mini SOURCE_DIR [OUTPUT]

SOURCE_DIR holds the four .gz archives, which are checked against TFDS's checksums. The same archives
and zlib give the same bytes. Prints the size, and the checksum that `embedded.py` declares.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from bnjax.data import builders, embedded


def make(source_dir: Path, output: Path) -> str:
    """Writes the first images of each split to `output`.

    Args:
        source_dir: the folder with the official archives.
        output: the .npz file to write.

    Returns:
        The SHA-256 of what was written.

    Raises:
        OSError: an archive is missing, or is not the official one.
    """
    full = builders.SOURCES["fashion_mnist"]
    paths = {info.filename: source_dir / info.filename for info in builders.archives(full).values()}
    for info in builders.archives(full).values():
        builders.verify(paths[info.filename], info, full.gzip_times[info.filename])
    arrays = full.read(paths)
    train, test = embedded.NUM_EXAMPLES["train"], embedded.NUM_EXAMPLES["test"]
    np.savez_compressed(
        output,
        train_x=arrays.train_x[:train],
        train_y=arrays.train_y[:train],
        test_x=arrays.test_x[:test],
        test_y=arrays.test_y[:test],
    )
    return hashlib.sha256(output.read_bytes()).hexdigest()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Makes the embedded data set.")
    parser.add_argument("source_dir", type=Path, help="the folder with Fashion-MNIST's four .gz archives")
    parser.add_argument("output", type=Path, nargs="?", default=embedded.PATH)
    args = parser.parse_args()
    checksum = make(args.source_dir, args.output)
    print(f"{args.output}: {args.output.stat().st_size} bytes, SHA-256 {checksum}")


if __name__ == "__main__":
    main()
