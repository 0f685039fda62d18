"""Processes that tests start, stop and kill: forked from one that has imported what they need, but has run nothing."""

import atexit
import multiprocessing
import os

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "bnjax", "fault_worker"])


def start(function, log, /, **options):
    """A process that calls `function(**options)`; its exit code is 1 if that raises. What it prints is in `log`."""
    process = SERVER.Process(target=_call, args=(function, log), kwargs=options)
    process.start()
    return process


def _call(function, log, **options):
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(**options)


def end_as_python(function, /, **options):
    """Calls it, and whatever waits for the end of the interpreter, which ends a forked process without it."""
    try:
        function(**options)
    finally:
        atexit._run_exitfuncs()


def end_of(process, seconds=300):
    """Its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "a process does not end"
    return process.exitcode
