"""The table of implementations: its reference, rows that catch what is wrong, the whole run, and the page it is on."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scripts

from experiments.bn_conformance import cases, layers, reference

bn_conformance = scripts.load("bn_conformance.__main__")
PAGE = Path(__file__).parents[1] / "docs" / "batch_norm.md"
BEGIN, END = "<!-- bn_conformance: begin -->", "<!-- bn_conformance: end -->"


@pytest.fixture
def main(tmp_path):
    """Runs the script in this process; the output folder is tmp_path/out."""

    def call(**options):
        scripts.run("bn_conformance.__main__", **({"out": str(tmp_path / "out")} | options))

    return call


def rows(*names):
    """The rows of these names."""
    found = {row.name: row for row in cases.rows()}
    return [found[name] for name in names]


def tables(page):
    """{row's title: {heading: cell}} for all rows of a page."""
    header, found = None, {}
    for line in page:
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if line.startswith("|  |"):
            header = cells
        elif line.startswith("| ") and "---" not in title:
            assert title not in found
            assert len(cells) == len(header)
            found[title] = dict(zip(header, cells, strict=True))
    return found


class TestReference:
    x, g = cases.draw((6, 3), mean=2.0), cases.draw((6, 3), seed=1)
    scale, bias = cases.parameters((3,))
    mask = cases.mask_of(6, 1, 4)

    def loss(self, x, scale, bias):
        valid = self.mask[:, 0]
        return (reference.train(x, scale, bias, self.g, valid, 0.1).y * self.g[valid]).sum()

    def test_derivatives_are_those_of_the_output(self):
        """By central differences with steps of 1e-4, whose error is 1e-8; numpy's longest floats may be float64."""
        at = [a.astype(np.longdouble) for a in (self.x, self.scale, self.bias)]
        exact = reference.train(*at, self.g, self.mask[:, 0], 0.1)
        for which, expected in enumerate((exact.dx, *exact.dparams)):
            for place in np.ndindex(expected.shape):
                step = np.zeros(expected.shape)
                step[place] = 1e-4
                up, down = (self.loss(*at[:which], at[which] + s, *at[which + 1 :]) for s in (step, -step))
                assert (up - down) / 2e-4 == pytest.approx(float(expected[place]), abs=1e-6)

    def test_what_is_masked_counts_for_nothing(self):
        valid = self.mask[:, 0]
        found = reference.train(np.where(self.mask, self.x, np.nan), self.scale, self.bias, self.g, valid, 0.1)
        alone = reference.train(self.x[valid], self.scale, self.bias, self.g[valid], np.ones(4, bool), 0.1)
        assert (found.y == alone.y).all()
        assert (found.dx[valid] == alone.dx).all()
        assert (found.dx[~valid] == 0).all()
        assert found.statistics[2] == alone.statistics[2] == 4
        np.testing.assert_allclose(found.statistics[0].astype(float), self.x[valid].mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.statistics[1].astype(float), self.x[valid].var(0), rtol=1e-6)

    @pytest.mark.parametrize(
        ("momentum", "debias"), [(0.0, False), (0.9, False), (1.0, False), (None, False), (0.9, True)]
    )
    def test_averages_are_weighted_sums(self, momentum, debias):
        means, variances = np.float64(cases.draw((4, 2))), 1 + np.float64(cases.draw((4, 2), seed=1)) ** 2
        weights = np.full(4, 1 / 4) if momentum is None else (1 - momentum) * momentum ** np.arange(3, -1, -1)
        start = 1 - weights.sum()  # what is left of mean 0 and variance 1
        weights, start = (weights / weights.sum(), 0) if debias else (weights, start)
        batches = [(mean, var, 8) for mean, var in zip(means, variances, strict=True)]
        found = reference.averages(batches, (0, 1), 0, momentum=momentum, debias=debias, unbiased=True)
        expected = weights @ means, weights @ variances * 8 / 7 + start
        np.testing.assert_allclose(np.float64(found), expected, rtol=1e-12)

    def test_averages_of_no_batch_and_of_one_sample(self):
        """None of it changes the mean, nor the variance; of one sample only the mean."""
        given = {"momentum": 0.5, "debias": False, "unbiased": True}
        batches = [(np.array([1.0]), np.array([7.0]), 0), (np.array([1.0]), np.array([0.0]), 1)]
        assert reference.averages(batches[:1], (3, 4), 10, **given) == (3, 4)
        assert reference.averages(batches, (3, 4), 10, **given) == (2, 4)


class TestWrongImplementations:
    """Each row must be able to fail: bnjax's layer with one thing wrong, and rows that should see it."""

    def off(self, options):
        made = layers.bnjax_layer(options)

        def train(*args):
            y, *rest = made.train(*args)
            return y + 1e-3, *rest

        return made._replace(train=train)

    def without_mask(self, options):
        made = layers.bnjax_layer(options)
        return made._replace(train=lambda params, stats, x, mask, g: made.train(params, stats, x, None, g))

    def by_device(self, options):
        return layers.bnjax_layer(options._replace(axis_name=None))

    def swapped_momentum(self, options):
        return layers.bnjax_layer(options._replace(momentum=1 - options.momentum))

    def double_gradient(self, options):
        made = layers.bnjax_layer(options)

        def train(*args):
            *rest, dx, dparams = made.train(*args)
            return *rest, 2 * dx, dparams

        return made._replace(train=train)

    def unbiased(self, options):
        return layers.bnjax_layer(options._replace(unbiased=True))

    @pytest.mark.parametrize(
        ("fault", "names"),
        [
            (off, ["axis: [N, C]", "mean/std 1e4, N = 512: output", "batch of one: output is the bias"]),
            (without_mask, ["mask: output", "mask: gradient", "mask: statistics", "NaN in masked entries: output"]),
            (without_mask, ["fully masked: running statistics as they were"]),
            (by_device, ["axis_name: output", "axis_name: gradient", "axis_name: statistics"]),
            (swapped_momentum, ["momentum 0.9: running statistics after 5 batches"]),
            (swapped_momentum, ["momentum 1: running statistics as they were"]),
            (double_gradient, ["without scale", "mean/std 1e4, N = 512: gradient", "inputs near 1e30: gradient"]),
            (unbiased, ["biased running variance, by option or default", "mask: statistics"]),
        ],
    )
    def test_is_caught(self, monkeypatch, fault, names):
        wrong = layers.Implementation("wrong", "bnjax", "bnjax", lambda options: fault(self, options))
        monkeypatch.setitem(layers.ALL, fault.__name__, wrong)
        for row in rows(*names):
            assert cases.run(row, "bnjax").status == "pass"
            assert cases.run(row, fault.__name__).status == "fail", row.name


@pytest.mark.parametrize("name", ["flax_linen", "flax_nnx"])
def test_flax(name):
    """Where it is right, wrong, of another convention, and does not offer something: the four kinds of cell."""
    expected = {
        "axis: [N, C]": "pass",
        "mask: output": "pass",
        "mean/std 1e4, N = 512: output": "fail",
        "fully masked: running statistics as they were": "fail",
        "batch of one: running variance as it was": "other",
        "momentum None: average over 5 batches": "not offered",
    }
    assert {row.name: cases.run(row, name).status for row in rows(*expected)} == expected


def test_errors_as_text():
    values = [3.2e-7, 0.0, 4, 0.04, 1.0, np.float32("nan"), np.inf]
    assert [cases.number(v) for v in values] == ["3e-7", "0", "4", "4e-2", "1e0", "NaN", "Inf"]


@pytest.mark.slow
def test_whole_run(main, tmp_path, capsys):
    """bnjax passes every row; the table goes to the folder, and to a page, the same both times."""
    page = tmp_path / "page.md"
    before, after = PAGE.read_text().split(BEGIN)[0], END + "\nThe rest.\n"
    page.write_text(f"{before}{BEGIN}\n\nold tables\n{after}")
    main(docs=page)
    count = len(cases.rows())
    out = capsys.readouterr().out
    assert re.search(rf"a: bnjax \S+ +{count} +0 +0 +0\n", out)
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    for group in bn_conformance.GROUPS:
        assert group in out
    written = (tmp_path / "out" / "conformance.md").read_text()
    found = tables(written.splitlines())
    assert {bn_conformance.title(row) for row in cases.rows()} <= {*found}
    assert found["bnjax " + layers.find(layers.ALL["bnjax"])[1]]["passed"] == str(count)
    assert "Measured with Python" in written
    assert page.read_text().startswith(before)
    assert page.read_text().endswith(after)
    assert "old tables" not in page.read_text()
    assert tables(page.read_text().partition(BEGIN)[2].splitlines()) == tables(written.splitlines())


class TestPage:
    found = tables(PAGE.read_text().partition(BEGIN)[2].splitlines())

    def test_has_every_row_and_no_other_and_bnjax_passes_them(self):
        measured = {bn_conformance.title(row) for row in cases.rows() if row.group != cases.ONNX}
        on_page = {title for title, cells in self.found.items() if "bnjax" in cells}
        onnx = {title for title in on_page if title.startswith("batchnorm_")}
        assert on_page - onnx == measured
        assert len(onnx) == 4
        if cases.onnx_cases():
            assert onnx == {*cases.onnx_cases()}
        for title in on_page:
            assert re.fullmatch(r"pass|0|\de-\d+", self.found[title]["bnjax"]), title

    def test_says_how_small_the_error_of_bnjax_is(self):
        assert "the error of bnjax is below 1e-6 in every row" in " ".join(PAGE.read_text().split())
        for title, cells in self.found.items():
            if re.match(r"[\de-]+$", cells.get("bnjax", "")) and "float16" not in title:
                assert float(cells["bnjax"]) < 1e-6, title

    def test_names_the_versions_of_all(self):
        titles = [implementation.title for implementation in layers.ALL.values()]
        lines = [title for title, cells in self.found.items() if "passed" in cells]
        assert all(re.fullmatch(re.escape(t) + r" \d[\w.+]*", line) for t, line in zip(titles, lines, strict=True))


def test_bnjax_failing_ends_with_status_1(main, monkeypatch, tmp_path):
    first, second = rows("axis: [N, C]", "momentum 1: running statistics as they were")
    monkeypatch.setattr(cases, "rows", lambda: [first._replace(tolerance=-1.0), second])
    with pytest.raises(SystemExit, match=r"error: bnjax fails 1 of 2 rows: axis: \[N, C\]$"):
        main(implementations="bnjax")
    assert "| axis: [N, C] | **" in (tmp_path / "out" / "conformance.md").read_text()


def test_what_is_not_installed_is_shown_as_such(main, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(layers.ALL, "haiku", layers.ALL["haiku"]._replace(module="no_such_module.part"))
    monkeypatch.setitem(sys.modules, "onnx.backend.test.case.node", None)  # its import then fails
    assert cases.onnx_cases() == {}
    one = rows("axis: [N, C]")
    monkeypatch.setattr(cases, "rows", lambda: one)
    main(implementations="bnjax,haiku")
    out = capsys.readouterr().out
    assert "Haiku not installed" in out
    assert re.search(r"ONNX backend node cases\n.*\n.*\nonnx is not installed", out)
    written = (tmp_path / "out" / "conformance.md").read_text()
    assert "| axis: [N, C] | pass |  |" in written
    assert re.search(r"\*\*ONNX backend node cases\*\*\n.*\n.*\n.*\n\nonnx is not installed", written)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"implementations": "flax_lines"},
            r"unknown implementation in --implementations 'flax_lines' \(did you mean 'flax_linen'\?\)",
        ),
        ({"implementations": ""}, "--implementations is empty"),
        ({"docs": "nowhere.md"}, "--docs=nowhere.md is not a page with the markers <!-- bn_conformance: begin"),
        ({"docs": PAGE, "implementations": "bnjax"}, r"--docs=.* would lose its columns of flax_linen, .*torch"),
        ({"out": "/dev/null/out"}, "--out=/dev/null/out cannot be written"),
    ],
)
def test_bad_flags_before_any_work(main, monkeypatch, options, words):
    monkeypatch.setattr(cases, "run", lambda *_: pytest.fail("work was started"))
    with pytest.raises(SystemExit, match="error: " + words):
        main(**options)


def test_arguments_that_are_no_flags(tmp_path):
    with pytest.raises(ValueError, match="unknown argument 'bnjax'"):
        bn_conformance.check(["bn_conformance.py", "bnjax"], tmp_path, None)
