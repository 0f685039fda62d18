"""`python -m bnjax status PATH`: what of a sweep's results is done."""

import argparse
import sys
from collections.abc import Sequence

from bnjax.sweeps.store import status as status_of


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bnjax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="what of a sweep's results is done")
    status.add_argument("path", help="a local folder or a URL")
    arguments = parser.parse_args(argv)
    try:
        print(status_of(arguments.path))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
