"""Experiment scripts in the tests' own process. absl's flags are global, and each script defines its own."""

import importlib
import sys

from absl import flags


def forget(*modules):
    """Removes the flags of all scripts, and of these modules."""
    for module in [*modules, *(m for m in sys.modules if m.startswith("experiments."))]:
        for flag in flags.FLAGS.get_flags_for_module(module):
            delattr(flags.FLAGS, flag.name)


def load(name):
    """The module `experiments.<name>`, its flags defined and those of no other script."""
    forget()
    full_name = f"experiments.{name}"
    if full_name in sys.modules:
        return importlib.reload(sys.modules[full_name])
    return importlib.import_module(full_name)


def run(name, **options):
    """Runs the script's `main` with these flags, and its defaults for all others."""
    module = load(name)
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS:
        flags.FLAGS[flag].unparse()
    try:
        module.main(flags.FLAGS([f"{name}.py", *(f"--{flag}={value}" for flag, value in options.items())]))
    finally:
        flags.FLAGS.unparse_flags()
