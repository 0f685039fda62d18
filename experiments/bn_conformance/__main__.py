"""Compares implementations of batch normalization: ours, Flax's, Haiku's, Equinox's, Keras's and PyTorch's.

    python -m experiments.bn_conformance

measures each implementation that is installed (the extra `peers` has all of them) on some hundred cases: semantics,
numerics, edge cases, and ONNX's own node cases; about a minute on 2 cores. Expect bnjax to pass every row.
"""

import itertools
import os
import platform
import string
import warnings
from collections.abc import Callable, Iterator
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

Results = dict[tuple[str, str], Result]  # by implementation, of those installed, and row


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
    versions = {name: f"{titles[name]} {version}" for name, (_, version) in found.items()}
    lettered = {name: f"{letter}: {versions[name]}" for name, letter in letters.items()}
    outcomes = count(lettered, results, LEGEND.format("with !"))
    for one in (*compared(rows, letters, results, lambda text: "! " + text.replace(" ", "\n")), outcomes):
        print(one.text(), end="\n\n")

    setting = f"Python {platform.python_version()} and jax {jax.__version__} on a {jax.default_backend().upper()}"
    shown = [count(versions, results), *compared(rows, titles, results, "**{}**".format)]
    text = f"Measured with {setting}. {LEGEND.format('in bold')}\n\n" + "\n".join(map(Table.markdown, shown))
    written = f"# Implementations of batch normalization, measured\n\n{text}"
    print(f"table:  {common.save(written, folder / TABLE, SCRIPT)}")
    if page:
        table.write_into(page, SCRIPT, text)
        print(f"docs:   {page}")
    ours = [row.name for row in rows if ("bnjax", row.name) in results]
    if failed := [name for name in ours if results["bnjax", name].status != "pass"]:
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
        written = table.between(page, SCRIPT)
        shown = [name for name, one in layers.ALL.items() if f"| {one.title} |" in written]
        if lost := [name for name in shown if name not in measured]:
            raise ValueError(f"--docs={page} would lose its columns of {', '.join(lost)}: install the extra peers")


def measure(rows: list[Case], names: list[str]) -> Results:
    """Every row for each implementation, on all cores: what takes time is compilation."""
    cells = list(itertools.product(rows, names))
    with warnings.catch_warnings(action="ignore"):  # the libraries' own
        found = common.in_threads(lambda cell: cases.run(*cell), cells, "measuring", os.cpu_count())
    return {(name, row.name): result for (row, name), result in zip(cells, found, strict=True)}


def count(headings: dict[str, str], results: Results, caption: str = "") -> Table:
    """The number of rows that each implementation passes; by its heading."""
    lines = []
    for name, heading in headings.items():
        found = [result.status for (of, _), result in results.items() if of == name]
        lines.append([heading, *(str(found.count(status)) if found else "" for status in STATUSES)])
    return Table("Rows by outcome", ["", *STATUSES.values()], lines, caption)


def compared(
    rows: list[Case], headings: dict[str, str], results: Results, failed: Callable[[str], str]
) -> Iterator[Table]:
    """The rows of each group; `headings` are the columns by implementation, `failed` marks a cell."""

    def text(row, name):
        if (name, row.name) not in results:
            return ""
        status, error = results[name, row.name]
        passed = error if row.group == cases.NUMERICS and row.tolerance > 0 else "pass"
        return {"pass": passed, "fail": failed(error), "other": f"({error})"}.get(status, "-")

    for group in GROUPS:
        lines = [[title(row), *(text(row, name) for name in headings)] for row in rows if row.group == group]
        yield Table(group, ["", *headings.values()], lines, "" if lines else "onnx is not installed")


def title(row: Case) -> str:
    """The row's name, marked if it is a convention."""
    return row.name + (" †" if row.convention else "")


if __name__ == "__main__":
    app.run(main)
