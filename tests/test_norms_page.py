"""docs/norms.md has the tables and verdicts of docs/results/norms.json, and no other numbers of theirs."""

import json
import re
from pathlib import Path

import pytest

from bnjax.theory import mean_field
from experiments.table import Table

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "norms.md").read_text()
CLAIMS = json.loads((DOCS / "results" / "norms.json").read_text())["claims"]


@pytest.mark.parametrize("claim", CLAIMS)
def test_tables_and_verdicts(claim):
    for one in CLAIMS[claim]["tables"]:
        assert Table(**one).markdown().strip() in PAGE
    for one in CLAIMS[claim]["findings"]:
        word = re.split("[:;]", one["verdict"])[0]
        assert f"- {one['claim']} *{word}*" in PAGE


def test_settings_that_the_page_names():
    robust = CLAIMS["robust"]["settings"]
    assert [robust[name] for name in ("steps", "image_steps", "image_batch_size", "pool")] == [100, 100, 32, 2]
    assert [robust["seeds"], robust["learning_rate"], robust["layers"], robust["hidden_width"]] == [
        [0, 1, 2],
        0.1,
        3,
        128,
    ]
    assert mean_field.gradient_growth("relu", norm="layer") == pytest.approx(1)
    assert mean_field.gradient_growth("relu") == pytest.approx(1.47, abs=0.005)
