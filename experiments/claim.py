"""A claim is a value: what is asked, how it is measured, and what numbers decide it. A script is a list of claims.

A claim's file has its settings (a frozen dataclass, checked in `__post_init__`), `measure`, `judge` and `figure`. This
module runs a list of them: it checks everything first, then measures, stores, judges and draws one after the other.
"""

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import xarray as xr
from absl import flags

import bnjax
from bnjax import choices
from bnjax.findings import Finding, verdict
from bnjax.sweeps import provenance
from experiments import common, settings, table

flags.disclaim_key_flags()
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Claim(Generic[S]):
    """A question, and the numbers that decide it.

    Attributes:
      name: short, such as "B6"; of its files, too.
      question: one sentence.
      source: who claimed it, where; and what of that was read.
      settings: the class of its settings.
      quick: those of a run on 2 cores within 3 minutes.
      full: those of --full.
      tiny: those of a test of a few seconds.
      measure: (settings, data) -> labelled results.
      judge: (results, settings) -> findings; their checks hold the numbers.
      figure: (results, settings) -> a matplotlib figure, or None.
      must_hold: whether the script fails unless all findings are supported.
      share: of the script's time, in any unit, for the time left.
      tables: (results, settings) -> what is printed and stored beside the findings.
      explanation: what a reader has to know of the question.
    """

    name: str
    question: str
    source: str
    settings: type[S]
    quick: S
    full: S
    tiny: S
    measure: Callable[[S, bnjax.Dataset | None], xr.Dataset]
    judge: Callable[[xr.Dataset, S], list[Finding]]
    figure: Callable[[xr.Dataset, S], Any] = lambda results, settings: None
    must_hold: bool = False
    share: float | int = 1
    tables: Callable[[xr.Dataset, S], Sequence[table.Table]] = lambda results, settings: ()
    explanation: str = ""


def script(
    name: str,
    claims: Sequence[Claim],
    data: Callable[[Sequence[Any]], bnjax.Dataset] | None = None,
    *,
    flag: str = "claims",
) -> Callable[[list[str]], None]:
    """Defines the flags of a script with these claims, and returns its main.

    Args:
      name: of the module in `experiments`.
      claims: in the order in which they run.
      data: (settings of the chosen claims) -> the data of all of them, by the flags; None: they need none.
      flag: which names the claims to check.
    """
    every = [one.name for one in claims]
    flags.DEFINE_list(flag, every, f"Which to run, of {', '.join(every)}.")
    flags.DEFINE_bool("full", False, "The full settings of each, for larger machines.")
    flags.DEFINE_string("out", f"results/{name}", "Output folder.")
    settings.define(claims)

    @common.interruptible()
    def main(argv: list[str]) -> None:
        common.prepare_process()
        folder = Path(flags.FLAGS.out).expanduser()
        try:
            common.check_arguments(argv)
            jobs = chosen(claims, flag)
            files = [f"{one.name}.{kind}" for one, _ in jobs for kind in ("zarr", "png")]
            common.check_out(folder, name, *files, f"{name}.json")
            ds = data([values for _, values in jobs]) if data else None
        except (ValueError, OSError, ImportError) as error:
            raise common.fail(str(error)) from None
        if failed := run(name, jobs, ds, folder):
            raise common.fail(failed)

    return main


def chosen(claims: Sequence[Claim], flag: str) -> list[tuple[Claim, Any]]:
    """[(claim, its settings)], by the flags, of which one names the claims.

    Raises:
      ValueError: naming the flag, for one that is not allowed.
    """
    by_name, names = {one.name: one for one in claims}, flags.FLAGS[flag].value
    if not names:
        raise ValueError(f"--{flag} is empty; allowed: {', '.join(by_name)}")
    for name in names:
        choices.check(f"{flag.removesuffix('s')} in --{flag}", name, by_name)
    if len({*names}) < len(names):
        raise ValueError(f"--{flag} names one twice: {','.join(names)}")
    return [(by_name[name], settings.parse(by_name[name], claims, full=flags.FLAGS.full)) for name in names]


def run(name: str, jobs: Sequence[tuple[Claim, Any]], ds: bnjax.Dataset | None, folder: Path) -> str:
    """Measures, stores, judges, draws and prints the claims. Returns what failed, in words; empty: nothing.

    A claim that ends in an error is reported; those beside it are stored.
    """
    start, failed, findings, figures = time.monotonic(), [], [], []
    report = _earlier(name, folder)
    total = sum(one.share for one, _ in jobs)
    for i, (one, values) in enumerate(jobs):
        begin = time.monotonic()
        try:
            results = one.measure(values, ds)
            common.save(results.assign_attrs(claim=one.name), folder / f"{one.name}.zarr", name)
            if report.pop(one.name, None):  # of the results that these replace
                _save_report(name, report, start, folder)
            found, shown = one.judge(results, values), one.tables(results, values)
            figure = one.figure(results, values)
            if figure is not None:
                figures.append(common.save(figure, folder / f"{one.name}.png", name))
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{one.name} ended in an error: {error}")
            continue
        findings += [(one.name, each) for each in found]
        report[one.name] = {
            "question": one.question,
            "source": one.source,
            "settings": settings.stored(values),
            "seconds": round(time.monotonic() - begin, 1),
            "findings": [each.as_json() for each in found],
            "tables": [each.as_json() for each in shown],
        }
        if one.must_hold and (wrong := [each.claim for each in found if verdict(each) != "supported"]):
            failed.append(f"{one.name} must hold, but: {' '.join(wrong)}")
        path = _save_report(name, report, start, folder)
        about = [text for text in (one.source, one.explanation) if text]
        parts = [table.findings_text(f"{one.name}: {one.question}", about, found), *(each.text() for each in shown)]
        print(*parts, sep="\n\n", end="\n\n", flush=True)
        spent, done = time.monotonic() - start, sum(each.share for each, _ in jobs[: i + 1])
        left = spent * (total - done) / done
        print(
            f"{i + 1} of {len(jobs)} claims, {spent:.0f} s so far, some {left:.0f} s left", file=sys.stderr, flush=True
        )
    if findings:
        print(table.summary(findings), end="\n\n")
    if len(failed) < len(jobs):
        print(f"report:   {path}")
        print(f"results:  {folder}/CLAIM.zarr (bnjax.load_results opens it)")
    for figure in figures:
        print(f"figure:   {figure}")
    print(f"{time.monotonic() - start:.0f} s in all")
    return "; ".join(failed)


def _earlier(name, folder) -> dict[str, Any]:
    """The script's earlier report on its claims, each with the command and the versions that it was made with.

    Empty if there is none, or if it is damaged.
    """
    path = folder / f"{name}.json"
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        if common.maker(path) == name:
            old = json.loads(path.read_text())
            made = {"made": {"command": old["command"], "versions": old["versions"]}}
            return {claim: made | one for claim, one in old["claims"].items()}
    return {}


def _save_report(name, report, start, folder) -> Path:
    content = {"versions": provenance.versions(), "seconds": round(time.monotonic() - start, 1), "claims": report}
    return common.save(content, folder / f"{name}.json", name)
