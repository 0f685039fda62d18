"""Tables: for the terminal, in at most 80 columns, and in Markdown between the markers of a page."""

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnjax import tables
from bnjax.findings import Finding, verdict
from bnjax.tables import COLUMNS


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text under a title.

    Attributes:
      title: one line, or more if it is long.
      columns: their names.
      rows: of as many cells.
      caption: what the columns mean; under the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def text(self, columns: int = COLUMNS) -> str:
        """For the terminal; cells that are too long are broken into lines."""
        parts = [wrapped(self.title, columns=columns), tables.text(self.columns, self.rows, columns)]
        return "\n".join([*parts, wrapped(self.caption, columns=columns)] if self.caption else parts)

    def markdown(self) -> str:
        """The title in bold, the table, the caption."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        rows = ["| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in row) + " |" for row in lines]
        return "\n".join([f"**{self.title}**", "", *rows, *(["", self.caption] if self.caption else []), ""])

    def as_json(self) -> dict[str, Any]:
        """Its stored form."""
        return dataclasses.asdict(self)


def wrapped(text: str, indent: str = "", columns: int = COLUMNS) -> str:
    """Broken into lines."""
    return textwrap.fill(text, columns, initial_indent=indent, subsequent_indent=indent)


def check_page(flag: str, page: Path, name: str) -> None:
    """Raises ValueError, naming the flag, unless the page has the markers of that name."""
    try:
        text = page.read_text()
    except (OSError, UnicodeDecodeError):
        text = ""
    if not re.search(_between(name), text, re.DOTALL):
        begin, end = _markers(name)
        raise ValueError(f"--{flag}={page} is not a page with the markers {begin} and {end}")


def between(page: Path, name: str) -> str:
    """The text of the page between the markers of that name."""
    found = re.search(_between(name), page.read_text(), re.DOTALL)
    return found[0] if found else ""


def write_into(page: Path, name: str, text: str) -> None:
    """Replaces what is between the markers of that name."""
    begin, end = _markers(name)
    new = f"{begin}\n{text.strip()}\n{end}"
    page.write_text(re.sub(_between(name), lambda _: new, page.read_text(), count=1, flags=re.DOTALL))


def _markers(name):
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _between(name):
    return ".*?".join(map(re.escape, _markers(name)))


def findings_text(title: str, about: Sequence[str], findings: Sequence[Finding]) -> str:
    """Paragraphs about a claim; of each finding the claim, what was measured against its bounds, the verdict."""
    parts = [wrapped(title), *(wrapped(text, "    ") for text in about)]
    for one in findings:
        parts += ["", wrapped(one.claim, "  ")] + ([wrapped(one.note, "    ")] if one.note else [])
        rows = [(check.statement, check.measured, check.bound, check.status) for check in one.checks]
        if rows:
            table = tables.text(("statement", "measured", "bound", ""), rows, COLUMNS - 4)
            parts.append(textwrap.indent(table, "    "))
        parts.append(wrapped(f"Verdict: {verdict(one)}", "    "))
    return "\n".join(parts)


def summary(findings: Sequence[tuple[str, Finding]]) -> str:
    """One row for each finding: of which claim, what it says, the verdict."""
    rows = [(name, one.claim, verdict(one)) for name, one in findings]
    return tables.text(("claim", "finding", "verdict"), rows)
