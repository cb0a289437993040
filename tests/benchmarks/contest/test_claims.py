"""The verdicts on the papers' claims, on cells whose numbers are known."""

import numpy as np
from support.report_cells import FC1, FC6, POINTS, make_cell, paper_cells, with_curve

from benchmarks.contest.claims import claims
from benchmarks.contest.summary import contests


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
