"""Who is writing: leases, files that processes keep in a store while they write to it."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bnjax.sweeps.storage import Files

LEASE = "bnjax/lease"
LEASE_SECONDS = 120  # a lease of another host that was not confirmed for so long is dead
CONFIRM_SECONDS = 20
held: set[str] = set()  # this process's own leases, by id: a file that it could not delete is none


class Busy(RuntimeError):
    """Another run is writing there."""


@contextlib.contextmanager
def lease(files: Files, index: int = 0, count: int = 1) -> Iterator[Callable[[], None]]:
    """While it lasts, no other run writes the share `index` of `count` of the store's chunks, nor other such shares.

    It is confirmed from time to time, by a file written there, until what it yields is called.

    A lease whose process is dead is taken over: on this host at once, from another one when it was not confirmed for
    `LEASE_SECONDS`.

    Raises:
      Busy: if another run is writing there; it says who.
    """
    key = f"{LEASE}/{index}-of-{count}"
    mine = {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
    }

    def text():
        return json.dumps(mine | {"confirmed": time.time()}).encode()

    def others():
        """The leases of the living that would write the same chunks."""
        for name in files.list(LEASE):
            one = _lease_of(files.get(f"{LEASE}/{name}"))
            if one.get("id") == mine["id"] or (
                name != f"{index}-of-{count}" and name.endswith(f"-of-{count}")
            ):
                continue
            if _alive(one):
                yield one
            else:
                files.delete(f"{LEASE}/{name}")

    def refuse():
        for one in others():
            raise Busy(
                f"{files.name}: process {one['pid']} on {one['host']} is writing there, last confirmed "
                f"{time.time() - one['confirmed']:.0f} s ago"
            )

    stop = threading.Event()

    def confirm():
        while not stop.wait(CONFIRM_SECONDS):
            with contextlib.suppress(Exception):  # tried again; without success others may take it for dead
                files.put(key, text())

    def rest():
        stop.set()
        if confirming.is_alive():
            confirming.join()  # or it might write the lease after it was given up

    confirming = threading.Thread(target=confirm, daemon=True)
    held.add(mine["id"])
    try:
        # What is found dead here must not have been replaced by a living one when it is deleted.
        with files.alone(LEASE):
            refuse()
            files.put_new(key, text())
        try:
            refuse()
            confirming.start()
            yield rest
        finally:
            rest()
            if _lease_of(files.get(key)).get("id") == mine["id"]:
                files.delete(key)
    finally:
        held.discard(mine["id"])


def writers(files: Files) -> list[dict[str, Any]]:
    """The leases of those who are alive."""
    return [one for name in files.list(LEASE) if _alive(one := _lease_of(files.get(f"{LEASE}/{name}")))]


def _lease_of(text: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(text)
        return found if {"id", "host", "pid", "born", "confirmed"} <= {*found} else {}
    except (TypeError, ValueError):
        return {}


def _alive(one: Mapping[str, Any]) -> bool:
    if not one:
        return False
    if one["host"] == socket.gethostname():
        ours = one["pid"] == os.getpid()
        return _born(one["pid"]) == one["born"] and (one["id"] in held or not ours)
    return time.time() - one["confirmed"] < LEASE_SECONDS


def _born(pid: int) -> str:
    """When the process started, in its host's terms; empty if there is none."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else others[18]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "" if Path("/proc/self/stat").exists() else "running"
