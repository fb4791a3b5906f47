"""Paired comparisons: hand arithmetic, pairing, refusals, and the table for the terminal."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llm_xrisk.evaluation.bootstrap import Bootstrap
from llm_xrisk.evaluation.compare import (
    compare,
    compare_files,
    comparison_table,
    paired_differences,
)
from llm_xrisk.evaluation.results import results_table, tabulate
from tests.evaluation.conftest import make_run

BASE = make_run("base", [0, 1, 2, 4], greedy=[0, 0, 1, 1])
BETTER = make_run("better", [2, 2, 2, 4], greedy=[0, 1, 1, 1])


def shown(renderable: object) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_difference_is_the_mean_of_the_paired_differences() -> None:
    found = compare(BASE, BETTER)
    assert found.baseline_mean == pytest.approx((0 + 1 + 2 + 4) / 16)
    assert found.candidate_mean == pytest.approx((2 + 2 + 2 + 4) / 16)
    assert found.difference == pytest.approx((2 + 1 + 0 + 0) / 16)
    assert found.lower < found.difference < found.upper
    assert (found.num_prompts, found.num_seeds) == (4, 1)


def test_the_detectable_difference_is_1_43_times_half_the_interval() -> None:
    found = compare(BASE, BETTER)
    half = (found.upper - found.lower) / 2
    assert found.minimum_detectable == pytest.approx((1.95996 + 0.84162) / 1.95996 * half, rel=1e-4)


def test_pairing_prompts_makes_the_interval_narrower_than_either_arm() -> None:
    rng = np.random.default_rng(0)
    ability = rng.beta(0.5, 0.5, 300)
    base = make_run("base", rng.binomial(4, ability).tolist())
    better = make_run("better", rng.binomial(4, np.minimum(ability + 0.1, 1)).tolist())
    bootstrap = Bootstrap(300)
    paired = compare(base, better, bootstrap=bootstrap)
    alone = bootstrap.interval(base.values("pass@1"))
    assert paired.upper - paired.lower < 0.8 * (alone.upper - alone.lower)
    assert paired.decided


def test_a_policy_does_not_differ_from_itself() -> None:
    found = compare(BASE, BASE)
    assert (found.difference, found.lower, found.upper) == (0.0, 0.0, 0.0)
    assert not found.decided


def test_swapping_the_arms_turns_the_sign() -> None:
    there, back = compare(BASE, BETTER), compare(BETTER, BASE)
    assert there.difference == -back.difference
    assert (there.lower, there.upper) == pytest.approx((-back.upper, -back.lower))


def test_prompts_are_paired_by_id_whatever_their_order() -> None:
    turned = make_run("better", [4, 2, 2, 2], sample_ids=[13, 12, 11, 10])
    straight = make_run("better", [2, 2, 2, 4])
    assert compare(BASE, turned).difference == compare(BASE, straight).difference
    np.testing.assert_array_equal(
        paired_differences(BASE, turned, "pass@1"), [[2 / 4, 1 / 4, 0, 0]]
    )


def test_runs_are_paired_by_seed_and_a_single_baseline_with_each() -> None:
    seeds = [make_run("a", [1, 1, 2, 4]), make_run("b", [2, 2, 2, 4])]
    against_one = paired_differences(BASE, seeds, "pass@1")
    np.testing.assert_array_equal(against_one, [[1 / 4, 0, 0, 0], [2 / 4, 1 / 4, 0, 0]])
    assert compare(BASE, seeds).num_seeds == 2
    assert paired_differences(seeds, seeds[::-1], "pass@1")[0].tolist() == [1 / 4, 1 / 4, 0, 0]


def test_arms_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3 runs; need the same number"):
        compare([BASE] * 2, [BETTER] * 3)
    with pytest.raises(ValueError, match="run 'other' has 4 prompts, of which 0 are among the 4"):
        compare(BASE, make_run("other", [1] * 4, sample_ids=[1, 2, 3, 4]))
    with pytest.raises(ValueError, match="got an arm without runs"):
        compare(BASE, [])
    with pytest.raises(
        ValueError, match=r"run 'better' has no metric 'pass@8', only pass@1, greedy"
    ):
        compare(BASE, BETTER, metric="pass@8")


def test_saved_evaluations_compare_as_live_ones(tmp_path: Path) -> None:
    BASE.save(tmp_path / "base.json")
    BETTER.save(tmp_path / "better.json")
    found = compare_files([tmp_path / "base.json"], [tmp_path / "better.json"])
    assert [row.metric for row in found] == BASE.metrics
    assert found[0] == compare(BASE, BETTER)


def test_the_comparison_table_shows_difference_interval_and_detectable() -> None:
    text = shown(comparison_table([compare(BASE, BETTER)]))
    assert "better 62.5" in text
    assert "+18.8" in text  # (2 + 1) / 16
    assert "4,000 resamples" in text


def test_the_results_table_compares_every_row_with_the_first() -> None:
    results = tabulate({"base": BASE, "ours": [BETTER, BETTER]})
    assert results.rows[0].cells["greedy"].to_base is None
    against = results.rows[1].cells["greedy"].to_base
    assert against is not None
    assert against.difference == 0.25
    assert results.rows[1].num_runs == 2
    text = shown(results_table(results))
    assert "50.0" in text
    assert "+25.0" in text
    assert "2 seeds" in text


def test_a_table_has_the_columns_that_all_runs_have() -> None:
    without_greedy = make_run("plain", [1, 1, 2, 4])
    results = tabulate({"base": BASE, "plain": without_greedy})
    assert results.metrics == ["pass@1", "pass@2", "mean_length", "truncation_rate"]
    with pytest.raises(ValueError, match="got no runs"):
        tabulate({})
