"""Files of a sweep that are damaged, odd or missing: never loaded wrong, named, and mended by the same sweep."""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import time
import zipfile

import numpy as np
import pytest
import xarray as xr
from fault_worker import sweep
from faults import check_part, check_whole, contents, die_at, slow

import bnjax
from bnjax.export import Damaged
from bnjax.sweeps import files, store


@contextlib.contextmanager
def noted(failed, what):
    """Goes on after an error, which is noted."""
    try:
        yield
    except Exception as error:
        failed.append(f"{what}: {type(error).__name__}: {error}")


def loaded(path):
    """(the data set, None), or (None, what is damaged, in one line)."""
    try:
        return bnjax.load_results(path), None
    except Damaged as error:
        return None, one_line(error)


def one_line(error):
    (line,) = str(error).splitlines()
    return line


def flip(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "a bit flipped": flip,
    "truncated": lambda path, draw: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, draw: os.truncate(path, 0),
    "missing": lambda path, draw: path.unlink(),
}


class TestDamage:
    # A file and a damage of all pairs, every n-th: the number of damages has no factor in common with it but 1.
    @pytest.mark.parametrize(("place", "every"), [("halfway", 5), ("done", 15), slow("halfway", 1), slow("done", 3)])
    def test_of_every_file(self, copy_of, undisturbed, caplog, place, every):
        """Never loaded wrong; named by who reads it; mended by the same sweep, which says so."""
        keys, failed = sorted(contents(copy_of(place))), []
        for key, damage in [*itertools.product(keys, DAMAGES)][::every]:
            path, kind = copy_of(place), key.rpartition("/")[0]
            right, gone = bnjax.load_results(path), damage == "missing"
            DAMAGES[damage](path / key, random.Random(f"{key} {damage}"))
            with noted(failed, f"{key} {damage}"):
                found, said = loaded(path)
                if kind == store.LOG or (kind == store.PARTS and not gone):
                    assert f"{path} is damaged" in said
                    assert (kind if gone else key) in said
                elif kind == store.PARTS:
                    assert check_part(found, undisturbed()) == 2 * len(contents(path, store.PARTS))
                else:
                    xr.testing.assert_identical(found, right)
                caplog.clear()
                sweep(path)
                lost = gone and kind in (store.PARTS, store.STATES)  # as if it had never been
                assert lost or key in ("bnjax/lock", "bnjax/zarr.json") or (kind if gone else key) in caplog.text
                check_whole(path, undisturbed())
        assert failed == []
        assert len(keys) > (4 if place == "halfway" else 24)

    @pytest.mark.slow
    def test_of_any_byte_is_never_loaded_wrong(self, copy_of):
        """100 random bits in each file: what is unchecked in 3% of a file is found with 95%."""
        path, draw, failed = copy_of("halfway"), random.Random(0), []
        right = bnjax.load_results(path)
        for key, whole in contents(path, "bnjax").items():
            for i in range(100):
                flip(path / key, draw)
                with noted(failed, (key, i)):
                    found, said = loaded(path)
                    assert said or found.identical(right)
                (path / key).write_bytes(whole)
        assert failed == []

    @pytest.mark.parametrize("damage", ["a bit flipped", "missing"])
    def test_of_the_record_of_another_sweep(self, copy_of, undisturbed, damage):
        path = copy_of("done")
        (key,) = contents(path, store.LOG)
        DAMAGES[damage](path / key, random.Random(0))
        before = contents(path, store.PARTS)
        for call in (bnjax.load_results, bnjax.status, functools.partial(sweep, of=1)):
            with pytest.raises(Damaged, match=store.LOG):
                call(path)
        assert contents(path, store.PARTS) == before
        sweep(path, of=1, overwrite=True)
        check_whole(path, undisturbed(of=1))

    @pytest.mark.parametrize("of", [0, 1])
    @pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(2)], ids=["old", "new", "both"])
    def test_of_several_while_another_overwrites(self, copy_of, undisturbed, caplog, which, of):
        """Whichever of the two records it is, and some parts, either sweep goes on."""
        path = copy_of("done")
        die_at(3, "parts", lambda: sweep(path, of=1, overwrite=True))
        damaged = (*sorted(contents(path, store.LOG))[which], *sorted(contents(path, store.PARTS))[::2])
        for key in damaged:
            flip(path / key, random.Random(0))
        sweep(path, of=of, overwrite=True)
        assert all(key in caplog.text for key in damaged if key.startswith(store.LOG))
        check_whole(path, undisturbed(of=of))


def zipped(header):
    """A zip of one array with that header, and no values."""
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as found:
        found.writestr("cell seed.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return text.getvalue()


ODD = [b"[" * 100_000, b"", b"\x00\xff\n" * 50, b"7", b"null", b"[[1], {}]", zipped(b"[" * 60_000)]
ODD += [zipped(b"{'descr': '|V1000000000', 'fortran_order': False, 'shape': (1,)}\n")]
ODD_ARRAYS = {  # those whose names begin so, changed
    "parts": {
        "test_loss": [lambda a: a.astype(complex), lambda a: a[:, :1], lambda a: None],
        "cell": [lambda a: a[0], lambda a: a.astype(object), lambda a: a[:, None]],
        "identity": [lambda a: np.array("another")],
    },
    "states": {
        "leaf 0": [lambda a: a + 7, lambda a: -a, lambda a: np.array("x"), lambda a: None],
        "leaf 3": [lambda a: a[:1], lambda a: a.astype(np.float64), lambda a: a[..., None], lambda a: None],
    },
}


def with_odd_arrays(data, beginning, change):
    arrays, text = dict(np.load(io.BytesIO(data))), io.BytesIO()
    changed = {name: change(a) if name.startswith(beginning) else a for name, a in arrays.items()}
    np.savez(text, **{name: a for name, a in changed.items() if a is not None})
    return text.getvalue()


class TestOddFiles:
    """Whoever wrote them: their digests are right."""

    @pytest.mark.parametrize("kind", ODD_ARRAYS)
    def test_parts_and_states(self, copy_of, undisturbed, caplog, kind):
        path = copy_of("halfway")
        first = sorted(contents(path, f"bnjax/{kind}"))[0]
        data, base = (path / first).read_bytes(), first.rpartition("-")[0]
        changes = ((name, one) for name, several in ODD_ARRAYS[kind].items() for one in several)
        odd = [*ODD, *(with_odd_arrays(data, *change) for change in changes)]
        odd = {f"{base}-{store.digest(one)}": one for one in odd}
        (path / first).unlink()
        for key, one in odd.items():
            (path / key).write_bytes(one)
        found, said = loaded(path)
        assert found is not None if kind == "states" else said.count(base) == 5
        sweep(path)
        assert sum(key in one_line(record.getMessage()) for record in caplog.records for key in odd) == len(odd)
        check_whole(path, undisturbed())

    @pytest.mark.parametrize("every", [32, slow(5)])
    def test_records(self, copy_of, undisturbed, every):
        """All of it is odd, or one value of it, at most two levels deep. It may turn out to be of another sweep."""
        (key,) = contents(copy_of("halfway"), store.LOG)
        right = json.loads((copy_of("halfway") / key).read_bytes().partition(b"\n")[2])
        bodies, failed = [*ODD], []
        for name, value in right.items():
            for odd in (None, 7, -1.5, "x", [], {}, [["x"]], {"x": {"y": []}}, "1000000000f4"):
                several = [value | {inner: odd} for inner in value] if isinstance(value, dict) else []
                bodies += [json.dumps(right | {name: one}).encode() for one in (odd, *several)]
        for body in bodies[::every]:
            path = copy_of("halfway")
            (path / key).write_bytes(store.digest(body).encode() + b"\n" + body)
            with noted(failed, body[:1000]):
                loaded(path)
                with contextlib.suppress(Damaged):
                    assert "cells done" in str(bnjax.status(path))
                try:
                    found = sweep(path)
                except ValueError as error:
                    one_line(error)
                else:
                    xr.testing.assert_equal(found, undisturbed()[0])
        assert failed == []

    def test_files_of_others_beside_them(self, copy_of, undisturbed):
        """Such as file managers and network file systems leave."""
        path = copy_of("halfway")
        for folder in (store.LOG, store.PARTS, store.STATES):
            for name in (".DS_Store", ".nfs0001", "~", "a-b", "00000001~"):
                (path / folder / name).write_bytes(b"odd")
        sweep(path)
        xr.testing.assert_identical(bnjax.load_results(path), undisturbed()[0])

    @pytest.mark.parametrize("hours", [-2, 2, 1e6])
    def test_locks(self, copy_of, undisturbed, monkeypatch, hours):
        """Nobody is locked out by what a note says, or by clocks that differ."""
        path, now = copy_of("halfway"), time.time()
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + 3600 * hours))
        note = f"process {os.getpid()} on elsewhere (since {when} by its clock)".encode()
        earlier = json.dumps({"pid": os.getpid(), "host": "elsewhere", "since": now}).encode()
        for one in (*ODD, b"\x1b[31m\r\n" * 10**6, earlier, b"process 1 on m\xc3\xbcller \xff\x1b[31m", note):
            (path / files.LOCK).write_bytes(one)
            assert "4 of 8 cells done" in str(bnjax.status(path))
        monkeypatch.setattr(time, "time", lambda: now - 3600 * hours)
        sweep(path)
        check_whole(path, undisturbed())
