"""Compares implementations of batch normalization: ours, Flax's, Haiku's, Equinox's, Keras's and PyTorch's.

    python -m experiments.bn_conformance

measures each implementation that is installed (the extra `peers` has all of them) on some hundred cases: semantics,
numerics, edge cases, and ONNX's own node cases; about a minute on 2 cores. Expect bnjax to pass every row.
"""

import dataclasses
import os
import platform
import string
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from absl import app, flags

from bnjax import choices
from experiments import common, table
from experiments.bn_conformance import cases, layers
from experiments.bn_conformance.cases import Case, Result
from experiments.table import Table

FLAGS = flags.FLAGS
flags.DEFINE_list("implementations", [*layers.ALL], "Which to measure.")
flags.DEFINE_string("out", "results/bn_conformance", "Output folder.")
flags.DEFINE_string("docs", None, "A Markdown page in which to replace the tables, between its markers.")

SCRIPT, TABLE = "bn_conformance", "conformance.md"
GROUPS = (cases.SEMANTICS, cases.NUMERICS, cases.EDGES, cases.ONNX)
STATUSES = {"pass": "passed", "fail": "failed", "other": "another convention", "not offered": "not offered"}
LEGEND = (
    "Numbers are errors, relative to the norm of the exact result unless the row says otherwise; {} those that "
    "fail, or the exception raised. †: our convention, no mathematical fact; (in brackets) another. -: not offered."
)

Results = dict[str, dict[str, Result]]  # by implementation, of those installed, then by row


@common.interruptible()
def main(argv: list[str]) -> None:
    """Flags -> measurements -> tables."""
    common.prepare_process()
    folder = Path(FLAGS.out).expanduser()
    page = Path(FLAGS.docs).expanduser() if FLAGS.docs else None
    try:
        check(argv, folder, page)
    except (ValueError, OSError) as error:
        raise common.fail(str(error)) from None
    rows, found = cases.rows(), {name: layers.find(layers.ALL[name]) for name in FLAGS.implementations}
    results = measure(rows, [name for name, (installed, _) in found.items() if installed])
    titles = {name: layers.ALL[name].title for name in found}
    letters = dict(zip(found, string.ascii_lowercase, strict=False))
    outcomes = count({name: f"{titles[name]} {version}" for name, (_, version) in found.items()}, results)
    for one in compared(rows, letters, results, lambda text: "! " + text.replace(" ", "\n")):
        print(one.text(), end="\n\n")
    legend = LEGEND.format("with !")
    lettered = [
        [f"{letter}: {line[0]}", *line[1:]] for letter, line in zip(letters.values(), outcomes.rows, strict=True)
    ]
    print(dataclasses.replace(outcomes, rows=lettered, caption=legend).text())

    setting = f"Python {platform.python_version()} and jax {jax.__version__} on a {jax.default_backend().upper()}"
    shown = [outcomes, *compared(rows, titles, results, "**{}**".format)]
    text = f"Measured with {setting}. {LEGEND.format('in bold')}\n\n" + "\n".join(map(Table.markdown, shown))
    written = f"# Implementations of batch normalization, measured\n\n{text}"
    print(f"table:  {common.save(written, folder / TABLE, SCRIPT)}")
    if page:
        table.write_into(page, SCRIPT, text)
        print(f"docs:   {page}")
    ours = results.get("bnjax", {})
    failed = [name for name, result in ours.items() if result.status != "pass"]
    if failed:
        raise common.fail(f"bnjax fails {len(failed)} of {len(ours)} rows: {'; '.join(failed)}")


def check(argv: list[str], folder: Path, page: Path | None) -> None:
    """Raises ValueError or OSError for what can be told to be wrong before any work."""
    common.check_arguments(argv)
    if not FLAGS.implementations:
        raise ValueError("--implementations is empty")
    for name in FLAGS.implementations:
        choices.check("implementation in --implementations", name, layers.ALL)
    common.check_out(folder, SCRIPT, TABLE)
    if page:
        table.check_page("docs", page, SCRIPT)
        measured = [name for name in FLAGS.implementations if layers.find(layers.ALL[name])[0]]
        shown = [name for name, one in layers.ALL.items() if f"| {one.title} |" in page.read_text()]
        if lost := [name for name in shown if name not in measured]:
            raise ValueError(f"--docs={page} would lose its columns of {', '.join(lost)}: install the extra peers")


def measure(rows: list[Case], names: list[str]) -> Results:
    """Every row for each implementation, on all cores: what takes time is compilation."""
    ignored, bar = warnings.catch_warnings(action="ignore"), common.progress(len(rows) * len(names), "measuring")
    with ignored, bar as tick, ThreadPoolExecutor(os.cpu_count()) as pool:  # ignored: the libraries' own warnings

        def column(name):
            results = {}
            for row in rows:
                results[row.name] = cases.run(row, name)
                tick()
            return results

        return dict(zip(names, pool.map(column, names), strict=True))


def count(headings: dict[str, str], results: Results) -> Table:
    """How many rows each implementation passes; by its heading."""
    statuses = {name: [result.status for result in results.get(name, {}).values()] for name in headings}
    lines = [[headings[name], *(str(of.count(one)) if of else "" for one in STATUSES)] for name, of in statuses.items()]
    return Table("Rows by outcome", ["", *STATUSES.values()], lines)


def compared(
    rows: list[Case], headings: dict[str, str], results: Results, failed: Callable[[str], str]
) -> Iterator[Table]:
    """The rows of each group.

    Args:
      rows: all.
      headings: {implementation: its column's}.
      results: of those measured.
      failed: marks the text of a cell that failed.
    """
    for group in GROUPS:
        lines = [
            [title(row), *(text(row, results.get(name, {}).get(row.name), failed) for name in headings)]
            for row in rows
            if row.group == group
        ]
        yield Table(group, ["", *headings.values()], lines, "" if lines else "onnx is not installed")


def title(row: Case) -> str:
    """The row's name, marked if it is a convention."""
    return row.name + (" †" if row.convention else "")


def text(row: Case, result: Result | None, failed: Callable[[str], str]) -> str:
    """A cell; in the tables of errors, the error."""
    if result is None:
        return ""
    passed = result.text if row.group == cases.NUMERICS and row.tolerance > 0 else "pass"
    return {"pass": passed, "fail": failed(result.text), "other": f"({result.text})"}.get(result.status, "-")


if __name__ == "__main__":
    app.run(main)
