"""Summaries, tables, figures, claims and the report, on cells whose numbers are known."""

import dataclasses
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from benchmarks import cells, curves, summary, tables, write_report
from benchmarks.cells import Cell, Run
from benchmarks.claims import claims
from benchmarks.methods import METHODS
from benchmarks.summary import Range, contests

STEPS, POINTS = 200, 20
OURS = ("bnp_sgd", "adam_z")
FC6, FC1 = "fc-cifar10-b6-raw", "fc-cifar10-b1-raw"


def make_cell(
    problem=FC6,
    method="sgd",
    losses=(0.9, 1.0, 1.1),
    scores=(0.4, 0.5, 0.6),
    rate=0.1,
    task="classification",
    seconds=4.0,
):
    """Losses fall to `losses` by equal factors, scores rise to `scores` by equal amounts."""
    runs = [run("tuning", tried, 0, seconds, 1.0, 0.5) for tried in (0.01, 0.1, 1.0)]
    runs += [
        run("final", rate, seed, seconds + seed, loss, score)
        for seed, (loss, score) in enumerate(zip(losses, scores, strict=True))
    ]
    known = METHODS[method].label if method in METHODS else method
    return Cell(
        problem={
            "name": problem,
            "title": f"Title of {problem}",
            "task": task,
            "batch_size": 6,
            "steps": STEPS,
            "points": POINTS,
            "source": "Figure 4",
            "scale": "small",
            "data": {"train": 1000},
        },
        method={"name": method, "label": known, "ours": method in OURS},
        grid=[0.01, 0.1, 1.0],
        seeds=3,
        environments=[
            {
                "versions": {"jax": "0.9.1", "numpy": "2.0"},
                "python": "3.12.1",
                "cpu": "a | b",
                "devices": ["cpu: cpu", "cpu: cpu"],
                "commit": "abc123",
            }
        ],
        runs=runs,
        rate=rate,
        complete=True,
    )


def run(role, rate, seed, seconds, loss, score):
    falling = np.geomspace(2.3, loss, POINTS)
    rising = np.linspace(0.1, score, POINTS)
    # The ends of geomspace are exact only to rounding.
    falling[-1], rising[-1] = loss, score
    return Run(role, rate, seed, seconds, 0, falling, falling + 0.5, rising)


def altered(cell, **changes):
    return dataclasses.replace(cell, **changes)


def with_curve(cell, seed, **values):
    """The cell with other curves in the final run of a seed."""
    runs = [
        dataclasses.replace(r, **values) if (r.role, r.seed) == ("final", seed) else r
        for r in cell.runs
    ]
    return altered(cell, runs=runs)


def only(found):
    (contest,) = contests(found)
    return contest


def rows(markdown):
    """The rows of each table, checked to be as long as its header."""
    found = []
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
            assert len({len(line) for line in lines}) == 1
            found.append([[cell.strip() for cell in line] for line in lines])
    return found


def test_numbers_of_a_summary():
    result = only([make_cell(losses=(0.5, 1.0, 1.5), scores=(0.2, 0.3, 0.7))]).summaries["sgd"]
    assert result.final["train_loss"] == pytest.approx(Range(1.0, 0.5, 1.5))
    assert result.final["loss"] == pytest.approx(Range(1.5, 1.0, 2.0))
    assert result.final["score"] == pytest.approx(Range(0.4, 0.2, 0.7))
    assert (result.note, result.diverged, result.at_edge) == (None, 0, False)
    assert result.name == "sgd"
    assert result.label == "SGD"
    assert not result.ours


def test_steps_and_time_to_the_loss_of_sgd():
    # 2.3 to 0.023 in 19 equal factors: 0.23 is passed halfway, between points 10 and 11.
    fast = make_cell(method="adam", losses=(0.023,) * 3, seconds=8.0)
    slow = make_cell(method="layernorm", losses=(0.3,) * 3)
    contest = only([make_cell(losses=(0.23,) * 3), fast, slow])
    assert contest.target == pytest.approx(0.23)
    assert contest.summaries["sgd"].steps_to_target == STEPS
    assert contest.summaries["adam"].steps_to_target == 110
    # Its fastest run took 8 s for 200 steps.
    assert contest.summaries["adam"].time_to_target == pytest.approx(110 * 8.0 / 200)
    assert contest.summaries["layernorm"].steps_to_target is None
    assert contest.summaries["layernorm"].time_to_target is None


def test_without_sgd_there_is_no_target():
    assert only([make_cell(method="adam")]).target is None
    diverged = make_cell(losses=(0.5, 0.5, np.nan))
    contest = only([diverged, make_cell(method="adam")])
    assert contest.target is None
    assert contest.summaries["adam"].steps_to_target is None
    assert contest.summaries["sgd"].diverged == 1
    assert contest.summaries["sgd"].final["train_loss"].mean == np.inf


def test_an_edge_is_that_of_the_rates_tried():
    assert only([make_cell(rate=1.0)]).summaries["sgd"].at_edge
    assert only([make_cell(rate=0.01)]).summaries["sgd"].at_edge
    beyond = make_cell(rate=1.0)
    beyond = altered(beyond, runs=[*beyond.runs, run("tuning", 3.0, 0, 1.0, 1.0, 0.5)])
    assert not only([beyond]).summaries["sgd"].at_edge
    alone = make_cell(rate=0.1)
    alone = altered(alone, grid=[0.1], runs=[r for r in alone.runs if r.role == "final"])
    assert not only([alone]).summaries["sgd"].at_edge


@pytest.mark.parametrize(
    ("ours", "baseline", "verdict"),
    [
        ((0.61, 0.65, 0.7), (0.4, 0.5, 0.6), "won"),
        ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "lost"),
        ((0.6, 0.7, 0.8), (0.4, 0.5, 0.6), "even"),
        ((0.3, 0.9, 0.9), (0.4, 0.5, 0.6), "even"),
        ((np.nan, 0.5, 0.9), (0.4, 0.5, 0.6), "lost"),
        ((0.1, 0.1, 0.1), (0.4, 0.5, np.nan), "won"),
        ((np.nan,) * 3, (np.nan,) * 3, "even"),
    ],
)
def test_verdicts(ours, baseline, verdict):
    found = [make_cell(scores=baseline), make_cell(method="bnp_sgd", scores=ours)]
    assert only(found).verdicts("score") == {"bnp_sgd": verdict}
    # The same as losses, less is better.
    opposite = {"won": "lost", "lost": "won", "even": "even"}
    if np.isfinite([*ours, *baseline]).all():
        found = [make_cell(losses=baseline), make_cell(method="bnp_sgd", losses=ours)]
        assert only(found).verdicts("train_loss") == {"bnp_sgd": opposite[verdict]}


def test_the_best_of_each_side_and_the_order():
    contest = only(
        [
            make_cell(method="adam_z", scores=(0.7, 0.7, 0.7)),
            make_cell(method="bnp_sgd", scores=(0.9, 0.9, 0.9)),
            make_cell(method="of_tomorrow", scores=(0.2, 0.2, 0.2)),
            make_cell(method="adam", scores=(0.8, 0.8, 0.8)),
            make_cell(method="sgd"),
        ]
    )
    assert list(contest.summaries) == ["sgd", "adam", "of_tomorrow", "bnp_sgd", "adam_z"]
    best = [contest.best("score", ours) for ours in (False, True, None)]
    assert [b.name for b in best if b is not None] == ["adam", "bnp_sgd", "bnp_sgd"]
    assert contest.verdicts("score") == {"bnp_sgd": "won", "adam_z": "lost"}


def test_what_cannot_be_compared_takes_no_part():
    cell = make_cell(method="bnp_sgd", scores=(0.9, 0.9, 0.9))
    other = cell.problem | {"steps": 400, "data": {"train": 7}}
    cases = {
        "skipped: no memory": Cell(cell.problem, cell.method, skipped="no memory"),
        "diverged at every rate": altered(cell, rate=None, runs=cell.runs[:3]),
        "incomplete: 0 of 3 final runs": altered(
            cell, rate=None, runs=cell.runs[:3], complete=False
        ),
        "incomplete: 2 of 3 final runs": altered(cell, runs=cell.runs[:-1], complete=False),
        "another setting than the others': steps, data": altered(cell, problem=other),
    }
    for note, case in cases.items():
        contest = only([make_cell(), case])
        assert contest.summaries["bnp_sgd"].note == note
        assert contest.best("score", ours=True) is None
        assert contest.verdicts("score") == {}
        assert contest.summaries["bnp_sgd"].steps_to_target is None
        text = tables.problem_section(contest)
        assert f"BNP + SGD (ours); {note}" in text
        assert "**40.0" not in text
        rows(text)
    assert only([cases["skipped: no memory"]]).summaries["bnp_sgd"].final == {}


def test_a_curve_with_holes_is_infinite_there():
    cell = make_cell()
    broken = np.array(cell.runs[3].train_loss)
    broken[5:] = np.nan
    cell = with_curve(cell, 0, train_loss=broken, score=np.where(broken > 0, 0.1, np.nan))
    loss, score = summary.curve(cell, "train_loss"), summary.curve(cell, "score")
    assert loss is not None
    assert score is not None
    assert np.isfinite(loss.mean[:5]).all()
    assert (loss.mean[5:] == np.inf).all()
    assert np.isfinite(loss.low).all()
    assert (score.low[5:] == -np.inf).all()


def test_the_table_of_a_problem():
    contest = only(
        [
            make_cell(losses=(0.5, 0.5, 0.5)),
            make_cell(method="adam", losses=(1.0, 1.0, np.nan), scores=(0.3, 0.3, np.nan), rate=1),
            make_cell(method="bnp_sgd", losses=(0.1, 0.2, 0.3), scores=(0.61, 0.62, 0.63)),
        ]
    )
    text = tables.problem_section(contest)
    ((header, _, sgd, adam, bnp),) = rows(text)
    assert header[4] == "test accuracy, %"
    assert sgd[:2] == ["SGD", "0.1"]
    assert sgd[2] == "0.500 (0.500 to 0.500)"
    assert adam[:3] == ["Adam; 1 of 3 seeds diverged", "1 at the edge", "diverged"]
    assert adam[4:] == ["diverged", "-", "-"]
    assert bnp[0] == "BNP + SGD (ours)"
    assert bnp[2:5] == [
        "**0.200 (0.100 to 0.300)**",
        "**0.700 (0.600 to 0.800)**",
        "**62.0 (61.0 to 63.0)**",
    ]
    assert re.fullmatch(r"\*\*\d+\*\*", bnp[5])
    assert re.fullmatch(r"\*\*[\d.]+ s\*\*", bnp[6])
    assert "target: a training loss of 0.500" in text
    assert "batches of 6; 200 steps; scale: small; repeats Figure 4" in text
    assert "Python 3.12.1, jax 0.9.1, a | b, cpu: cpu, commit abc123" in text
    assert "different" not in text


def test_unequal_tuning_is_said():
    base, other = make_cell(), make_cell(method="bnp_sgd")
    places = [other.environments[0] | {"cpu": "another"}]
    text = tables.problem_section(
        only([base, altered(other, grid=[0.1], seeds=2, environments=places)])
    )
    assert "different grids" in text
    assert "different numbers of seeds" in text
    assert "not comparable" in text
    commits = [other.environments[0] | {"commit": "def456"}]
    assert "comparable" not in tables.problem_section(
        only([base, altered(other, environments=commits)])
    )


def test_the_overview_of_a_regression_and_of_a_missing_side():
    found = [
        make_cell("drift-x", "sgd", scores=(0.5, 0.5, 0.5), task="regression"),
        make_cell("drift-x", "bnp_sgd", scores=(0.9, 0.91, 0.92), task="regression"),
        make_cell("alone", "sgd"),
    ]
    scores, losses, counts = rows(tables.overview(contests(found)))
    assert scores[2] == [
        "`drift-x`",
        "SGD",
        "0.500 (0.500 to 0.500)",
        "BNP + SGD",
        "0.910 (0.900 to 0.920)",
        "won",
    ]
    assert scores[3] == ["`alone`", "SGD", "50.0 (40.0 to 60.0)", "-", "-", "-"]
    assert losses[2][-1] == "even"
    assert counts[2] == ["BNP + SGD", "1", "0", "0", "0", "1", "0"]


def test_rates_beside_the_papers():
    found = [make_cell(), make_cell(method="bnp_sgd"), make_cell("cnn-cifar10-b128-raw")]
    (table,) = rows(tables.rates(contests(found)))
    assert [f"`{FC6}`", "SGD", "0.1", "0.005", "20"] in table
    assert [f"`{FC6}`", "BNP + SGD", "0.1", "0.05", "2"] in table
    assert [f"`{FC6}`", METHODS["batchrenorm"].label, "-", "0.05", "-"] in table
    assert ["`cnn-cifar10-b128-raw`", "SGD", "0.1", "0.1 (Adam)", "-"] in table
    assert tables.ratio(0.1 / 0.0005) == "200"


def test_a_bar_in_a_cell_is_no_column():
    ((_, _, row),) = rows(tables.table(["a", "b"], [["x | y", "1"]]))
    assert row == [r"x \| y", "1"]


def paper_cells():
    """Some of the paper's problems; BNP as it says at batches of 6, not at the others."""
    mnist, cnn1 = "fc-mnist-b60-raw", "cnn-cifar10-b1-raw"
    chance = (0.1, 0.1, 0.1)
    return [
        make_cell(mnist, "sgd", scores=(0.90, 0.91, 0.92)),
        make_cell(mnist, "batchnorm", scores=(0.97, 0.97, 0.97), rate=1.0),
        make_cell(mnist, "layernorm", scores=(0.915, 0.93, 0.94)),
        make_cell(mnist, "bnp_sgd", scores=(0.94, 0.94, 0.94), rate=1.0),
        make_cell(FC6, "sgd", scores=(0.40, 0.41, 0.42)),
        make_cell(FC6, "batchnorm", scores=(0.30, 0.31, 0.43)),
        make_cell(FC6, "batchrenorm", scores=(0.45, 0.45, 0.45)),
        make_cell(FC6, "bnp_sgd", scores=(0.43, 0.44, 0.45)),
        make_cell(FC1, "sgd", scores=(0.40, 0.40, 0.40), losses=(1.0, 1.0, 1.0)),
        make_cell(FC1, "batchnorm", scores=chance),
        make_cell(FC1, "bnp_sgd", scores=(0.39, 0.39, 0.39), losses=(0.5, 0.6, 0.7)),
        make_cell(cnn1, "sgd", scores=(0.40, 0.40, 0.40)),
        altered(make_cell(cnn1, "batchnorm"), rate=None, runs=[]),
        make_cell(cnn1, "bnp_sgd", scores=(0.39, 0.39, 0.39)),
    ]


def test_claims():
    checked = {claim.text: claim for claim in claims(contests(paper_cells()))}
    expected = {
        "fc-mnist-b60-raw: BNP is comparable to BN": "not replicated",
        f"{FC6}: BNP is comparable to BatchRenorm": "replicated",
        f"{FC6}: BNP reaches a higher score than BN": "within the seeds' range",
        f"{FC6}: BNP reaches a higher score than the plain network": "replicated",
        f"{FC1}: BNP trains with one example a step": "replicated",
        "cnn-cifar10-b1-raw: BNP trains with one example a step": "not replicated",
        f"{FC1}: BN cannot train with one example a step": "replicated",
        "cnn-cifar10-b1-raw: BN cannot train with one example a step": "replicated",
        f"{FC1}: BNP trains to a lower loss than the plain network": "replicated",
        "cnn-cifar10-b1-raw: BNP reaches a higher score than the plain network": "not replicated",
        "fc-mnist-b60-raw: LayerNorm reaches a higher score than the plain network": (
            "within the seeds' range"
        ),
        "fc-mnist-b60-raw: the best rates are within a factor of 5 of the paper's": "replicated",
        f"{FC6}: the best rates are within a factor of 5 of the paper's": "not replicated",
        "cnn-cifar10-b2-raw: BNP reaches a higher score than BN": "no data",
        f"{FC1}: LayerNorm trains to a lower loss than the plain network": "no data",
    }
    assert {text: checked[text].verdict for text in expected} == expected
    assert len(checked) == len(claims(contests(paper_cells())))
    numbers = checked[f"{FC6}: BNP reaches a higher score than BN"].numbers
    assert numbers == "BNP + SGD 44.0 (43.0 to 45.0), BatchNorm + SGD 34.7 (30.0 to 43.0)"
    rates = checked[f"{FC6}: the best rates are within a factor of 5 of the paper's"].numbers
    assert rates == (
        "3 of 4; ratios to the paper's: the plain network 20, BN 2, BNP 2, BatchRenorm 2"
    )
    assert checked["cnn-cifar10-b2-raw: BNP reaches a higher score than BN"].numbers == (
        "cnn-cifar10-b2-raw was not run"
    )
    assert "LayerNorm was not run" in (
        checked[f"{FC1}: LayerNorm trains to a lower loss than the plain network"].numbers
    )
    assert {claim.verdict for claim in claims([])} == {"no data"}


def drifting(method, before, after):
    """Scores per seed before and after the first third."""
    cell = make_cell("fc-drift", method)
    for seed, ends in enumerate(zip(before, after, strict=True)):
        scores = np.repeat(ends, [POINTS // 3, POINTS - POINTS // 3])
        cell = with_curve(cell, seed, score=scores)
    return cell


def test_drift():
    def verdict(ours, rival):
        found = contests([drifting("bnp_sgd", *ours), drifting("sgd", *rival)])
        (claim,) = (c for c in claims(found) if "the drift costs BNP" in c.text)
        return claim.verdict, claim.numbers

    steady = (0.8, 0.8, 0.8), (0.7, 0.75, 0.79)
    shaken = (0.9, 0.9, 0.9), (0.5, 0.6, 0.7)
    assert verdict(steady, shaken) == (
        "replicated",
        "BNP + SGD 80.0 before, 74.7 after, SGD 90.0 before, 60.0 after",
    )
    assert verdict(shaken, steady)[0] == "not replicated"
    assert verdict(steady, steady)[0] == "within the seeds' range"
    broken = (0.9, 0.9, 0.9), (0.9, 0.9, np.nan)
    gone = (np.nan,) * 3, (np.nan,) * 3
    assert verdict(broken, shaken)[0] == "not replicated"
    assert verdict(shaken, gone) == (
        "replicated",
        "BNP + SGD 90.0 before, 60.0 after, SGD diverged before, diverged after",
    )


def figure_of(found, name):
    group = next(g for g in curves.GROUPS if g.name == name)
    return curves.draw(contests(found), group)


def test_lines_and_bands_of_a_panel():
    losses = (0.5, 1.0, 1.5)
    found = [make_cell(losses=losses), make_cell(method="bnp_sgd", scores=(0.7, 0.8, 0.9))]
    figure = figure_of(found, "figure-4")
    above, below = figure.axes
    assert (above.get_yscale(), below.get_yscale()) == ("log", "linear")
    assert above.get_title() == f"Title of {FC6}"
    assert above.get_ylabel() == "training loss, nats"
    assert below.get_ylabel() == "test accuracy, %"
    sgd, bnp = above.get_lines()
    assert (sgd.get_label(), bnp.get_label()) == ("SGD", "BNP + SGD")
    assert {line.get_linestyle() for line in above.get_lines()} == {"--"}
    assert {line.get_linestyle() for line in below.get_lines()} == {"-"}
    assert to_rgb(bnp.get_color()) == to_rgb(METHODS["bnp_sgd"].color)
    np.testing.assert_array_equal(sgd.get_xdata(), np.arange(10, STEPS + 1, 10))
    expected = np.mean([np.geomspace(2.3, loss, POINTS) for loss in losses], axis=0)
    np.testing.assert_allclose(sgd.get_ydata(), expected)
    band = below.collections[1].get_paths()[0].vertices
    at_end = band[band[:, 0] == STEPS, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((70, 90))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["SGD", "BNP + SGD"]


def test_what_diverged_stays_in_the_panel():
    broken = np.full(POINTS, np.nan)
    found = [
        make_cell(),
        with_curve(make_cell(method="adam"), 1, train_loss=broken, score=broken),
        make_cell(method="bnp_sgd", losses=(np.nan,) * 3, scores=(np.nan,) * 3),
    ]
    figure = figure_of(found, "others")
    for axis in figure.axes:
        for line in axis.get_lines():
            assert np.isfinite(line.get_ydata()).all()
    _, adam, _ = figure.axes[0].get_lines()
    np.testing.assert_allclose(adam.get_ydata(), 3 * 2.3)
    _, adam, _ = figure.axes[1].get_lines()
    np.testing.assert_array_equal(adam.get_ydata(), 0)


def test_drawn_are_the_papers_the_best_baseline_and_the_best_of_ours():
    names = ["sgd", "adam", "batchnorm", "layernorm", "bnp_sgd", "adam_z", "bnp_sgd_warm"]
    found = [make_cell(method=name) for name in names]
    found[1] = make_cell(method="adam", scores=(0.9, 0.9, 0.9))
    found[5] = make_cell(method="adam_z", scores=(0.9, 0.9, 0.9))
    contest = only(found)
    drawn = curves.chosen(contest, ("sgd", "bnp_sgd", "absent"))
    assert [s.name for s in drawn] == ["sgd", "adam", "bnp_sgd", "adam_z"]
    assert [s.name for s in curves.chosen(contest, names, limit=3)] == ["sgd", "adam", "adam_z"]
    incomplete = altered(found[4], complete=False)
    assert [s.name for s in curves.chosen(only([found[0], incomplete]), names)] == ["sgd"]


def test_methods_of_one_color_differ_in_markers():
    found = [make_cell(method=name) for name in ("sgd", "u1", "u2", "u3", "u4", "u5", "u6")]
    group = curves.Group("x", "X", ("*",), tuple(c.method["name"] for c in found))
    (axis, _) = curves.draw(contests(found), group).axes
    styles = {(to_rgb(line.get_color()), line.get_marker()) for line in axis.get_lines()}
    assert len(styles) == 7


@pytest.mark.parametrize(
    ("problem", "group"),
    [
        ("fc-mnist-b60-raw", "figure-3"),
        ("fc-cifar10-b6-raw", "figure-4"),
        ("cnn-cifar10-b1-raw", "figure-4"),
        ("cnn-cifar10-b128-raw", "figure-5"),
        ("drift-scale-digits", "drift"),
        ("fc-fashion-mnist-b60-raw", "further-images"),
        ("resnet110-cifar10", "figures-6-7"),
        ("friedman-raw", "others"),
    ],
)
def test_groups(problem, group):
    assert curves.group_of(problem).name == group


def test_figures_are_written(tmp_path):
    # Five columns need a second block of rows, with empty places.
    found = [make_cell(f"fc-cifar10-b60-{i}", m) for i in range(5) for m in ("sgd", "bnp_sgd")]
    skipped = make_cell("resnet-x", "bnp_sgd")
    found.append(Cell(skipped.problem, skipped.method, skipped="too large"))
    (path,) = curves.save_figures(found, tmp_path / "new")
    assert path == tmp_path / "new" / "figure-3.png"
    image = matplotlib.image.imread(path)
    assert image.shape[1] > 1000
    assert image[..., :3].std() > 0.02


def test_the_report(tmp_path):
    results, output = tmp_path / "results", tmp_path / "report"
    for cell in paper_cells():
        name = f"{cell.method['name']}.json"
        cells.write(results / cell.problem["name"] / name, cell)
    (results / FC6 / "adam.json").write_text("{")
    (results / FC6 / "adam_z.json.corrupt").write_text("{")
    text = write_report.report(results, output)
    assert (output / "report.md").read_text() == text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["figure-3.png", "figure-4.png"]
    for link in links:
        assert matplotlib.image.imread(output / link).ndim == 3
    assert len(rows(text)) == 3 + 1 + 4 + 1
    assert f"- `{FC6}/adam.json`, corrupt: no JSON" in text
    assert f"- `{FC6}/adam_z.json.corrupt`: set aside as corrupt" in text
    assert "- `cnn-cifar10-b1-raw/batchnorm`: diverged at every rate" in text
    assert text.index("### Title of fc-mnist") < text.index(f"### Title of {FC6}")


def test_a_report_of_nothing(tmp_path):
    text = write_report.report(tmp_path / "nowhere", tmp_path / "report")
    assert "No results in `nowhere`." in text
    assert rows(text) == []
