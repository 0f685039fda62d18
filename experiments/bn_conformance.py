"""Which batch normalization is right where? Ours, Flax's, Haiku's, Equinox's, Keras's and PyTorch's, measured.

    python -m experiments.bn_conformance

measures each implementation that is installed (the extra `peers` has all of them) on some hundred cases: semantics,
numerics, edge cases, and ONNX's own node cases; about a minute on 2 cores. Expect bnjax to pass every row.
"""

import os
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import rich.progress
from absl import app, flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnjax import choices
from experiments import common
from experiments.conformance import cases, layers
from experiments.conformance.cases import Case, Result

FLAGS = flags.FLAGS

flags.DEFINE_list("implementations", [*layers.ALL], "Which to measure.")
flags.DEFINE_string("out", "results/bn_conformance", "Output folder.")
flags.DEFINE_string("docs", None, "A Markdown page in which to replace the tables, between its markers.")

SCRIPT, TABLE = "bn_conformance", "conformance.md"
GROUPS = (cases.SEMANTICS, cases.NUMERICS, cases.EDGES, cases.ONNX)
NO_ONNX = "onnx is not installed"
BEGIN, END = "<!-- bn_conformance: begin -->", "<!-- bn_conformance: end -->"
STYLES = {"pass": "green", "fail": "bold red", "other": "yellow", "not offered": "dim"}
STATUSES = {"pass": "passed", "fail": "failed", "other": "another convention", "not offered": "not offered"}
LEGEND = (
    "Numbers are errors, relative to the norm of the exact result unless the row says otherwise; in bold those that "
    "fail, or the exception raised. †: our convention, no mathematical fact; (in brackets) another. -: not offered."
)

Found = dict[str, tuple[bool, str]]  # by implementation: installed?, and its version or why not
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
    rows = cases.rows()
    found = {name: layers.find(layers.ALL[name]) for name in FLAGS.implementations}
    results = measure(rows, [name for name, (installed, _) in found.items() if installed])
    report(rows, found, results)

    text = markdown(rows, found, results)
    table = f"# Implementations of batch normalization, measured\n\n{text}"
    print(f"table:  {common.save(table, folder / TABLE, SCRIPT)}")
    if page:
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
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
    if page and not (page.is_file() and BEGIN in page.read_text() and END in page.read_text()):
        raise ValueError(f"--docs={page} is not a page with the markers {BEGIN} and {END}")
    if page:
        tables = page.read_text().partition(BEGIN)[2].partition(END)[0]
        measured = [name for name in FLAGS.implementations if layers.find(layers.ALL[name])[0]]
        lost = [
            name for name in layers.ALL if f"| {layers.ALL[name].title} |" in tables and name not in measured
        ]
        if lost:
            raise ValueError(
                f"--docs={page} would lose its columns of {', '.join(lost)}: install the extra peers"
            )


def measure(rows: list[Case], names: list[str]) -> Results:
    """Every row for each implementation, on all cores: what takes time is compilation."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    pool = ThreadPoolExecutor(os.cpu_count())
    progress = rich.progress.Progress(*columns, console=Console(stderr=True))
    task = progress.add_task("measuring", total=len(rows) * len(names))

    def column(name):
        results = {}
        for row in rows:
            results[row.name] = cases.run(row, name)
            progress.advance(task)
        return results

    with warnings.catch_warnings(action="ignore"), progress:  # the libraries' own warnings
        try:
            return dict(zip(names, pool.map(column, names), strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # at Ctrl-C, not after the last row


def report(rows: list[Case], found: Found, results: Results) -> None:
    """Prints a table for each group, and how many rows each implementation passes."""
    console = common.console()
    for group, named in by_group(rows):
        table = Table(title=group)
        table.add_column("")
        for name in found:
            table.add_column(heading(name, found).replace(" ", "\n"), justify="right")
        for row in named:
            columns = (results.get(name, {}).get(row.name) for name in found)
            cells = (f"[{STYLES[c.status]}]{escape(marked(row, c))}[/]" if c else "" for c in columns)
            table.add_row(escape(title(row)), *cells)
        console.print(table if named else f"{group}: {NO_ONNX}")
    console.print(LEGEND.replace("in bold those", "with ! those"))
    for name, column in results.items():
        console.print(f"{heading(name, found)}: {summary(column)}", highlight=False)
    for name, (installed, _) in found.items():
        if not installed:
            console.print(heading(name, found), highlight=False)


def markdown(rows: list[Case], found: Found, results: Results) -> str:
    """The same, with the versions."""
    platform_name = jax.default_backend().upper()
    lines = [
        f"Measured with Python {platform.python_version()} and jax {jax.__version__} on a {platform_name}. {LEGEND}",
        *(
            "",
            "| | " + " | ".join(heading(name, found) for name in found) + " |",
            "|---|" + "---|" * len(found),
        ),
    ]
    for status in STYLES:
        counts = (count(results[name], status) if name in results else "" for name in found)
        lines.append(f"| {STATUSES[status]} | " + " | ".join(map(str, counts)) + " |")
    for group, named in by_group(rows):
        lines += ["", f"**{group}**" if named else f"**{group}**: {NO_ONNX}", ""]
        if named:
            lines += ["| | " + " | ".join(layers.ALL[name].title for name in found) + " |"]
            lines += ["|---|" + "---|" * len(found)]
        for row in named:
            columns = (results.get(name, {}).get(row.name) for name in found)
            cells = (f"**{text(row, c)}**" if c and c.status == "fail" else text(row, c) for c in columns)
            lines.append(f"| {title(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_group(rows: list[Case]) -> list[tuple[str, list[Case]]]:
    """The rows of each group; none of ONNX's where it is not installed."""
    return [(group, [row for row in rows if row.group == group]) for group in GROUPS]


def heading(name: str, found: Found) -> str:
    """Title and version, or that it is not installed."""
    return f"{layers.ALL[name].title} {found[name][1]}"


def title(row: Case) -> str:
    """The row's name, marked if it is a convention."""
    return row.name + (" †" if row.convention else "")


def text(row: Case, result: Result | None) -> str:
    """What stands in a cell."""
    if result is None:
        return ""
    if result.status == "pass":  # in the tables of errors, the error
        return result.text if row.group == cases.NUMERICS and row.tolerance > 0 else "pass"
    return {"fail": result.text, "other": f"({result.text})", "not offered": "-"}[result.status]


def marked(row: Case, result: Result) -> str:
    """The cell for a terminal, where colour alone must not tell a failure."""
    return f"! {text(row, result)}" if result.status == "fail" else text(row, result)


def count(column: dict[str, Result], status: str) -> int:
    """How many rows of an implementation have that status."""
    return sum(result.status == status for result in column.values())


def summary(column: dict[str, Result]) -> str:
    """`105 passed, 3 failed, ...`."""
    return ", ".join(f"{count(column, status)} {words}" for status, words in STATUSES.items())


if __name__ == "__main__":
    app.run(main)
