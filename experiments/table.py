"""Findings as text of at most 80 columns."""

import textwrap
from collections.abc import Sequence

from bnjax import tables
from bnjax.findings import Finding, verdict
from bnjax.tables import COLUMNS


def wrapped(text: str, indent: str = "") -> str:
    """Broken into lines."""
    return textwrap.fill(text, COLUMNS, initial_indent=indent, subsequent_indent=indent)


def findings_text(name: str, question: str, source: str, findings: Sequence[Finding]) -> str:
    """A claim's question and source; of each finding the claim, what was measured against its bounds, the verdict."""
    parts = [wrapped(f"{name}: {question}")] + ([wrapped(source, "    ")] if source else [])
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
