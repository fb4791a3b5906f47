"""What stands between the runs of benchmarks/imbalanced.py and its table."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.tabular import grid
from benchmarks.tabular.metrics import mcclish, metric, weighted
from benchmarks.tabular.store import Store, encode
from benchmarks.tabular.summary import best, over_seeds
from benchmarks.tabular.training import Run

RUN = Run("BCE", {"weight": 1}, 0.01, 0, "mammography-test")


def test_every_method_has_as_many_configurations_as_any_other():
    for methods in (grid.METHODS, grid.DIGITS):
        assert {len(method.settings) for method in methods.values()} == {4}
        assert all(peer in methods for method in methods.values() for peer in method.peers)


@pytest.mark.parametrize("name", list(grid.METRICS))
def test_a_resample_by_counts_is_the_metric_of_the_repeated_rows(name: str):
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=60), (np.arange(60) < 12).astype(int)
    counts = np.concatenate(
        [rng.multinomial(12, [1 / 12] * 12), rng.multinomial(48, [1 / 48] * 48)]
    )
    repeated = metric(name, np.repeat(scores, counts), np.repeat(targets, counts))
    assert weighted(name, scores, targets, counts[None])[0] == pytest.approx(repeated)


def test_the_one_way_area_rescales_to_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    scores, targets = rng.normal(size=200), (np.arange(200) < 20).astype(int)
    expected = metrics.roc_auc_score(targets, scores, max_fpr=grid.MAX_FPR)
    assert mcclish(metric("opauc", scores, targets)) == pytest.approx(expected)


def test_a_configuration_that_diverged_on_one_fold_is_not_chosen():
    assert best({"a": [0.9, float("nan")], "b": [0.5, 0.6], "c": [0.4, 0.5]}) == "b"
    with pytest.raises(ValueError, match="all 1 configurations gave NaN"):
        best({"a": [float("nan")]})
    assert np.isnan(metric("auroc", np.array([np.nan, 1.0]), np.array([0, 1])))


def test_the_interval_over_seeds_holds_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        low, high = over_seeds(rng.normal(1.0, 0.1, size=5).tolist(), resamples=500).seeds
        inside += low <= 1.0 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_finished_runs_survive_a_process_that_was_killed_while_writing(tmp_path: Path):
    scores = np.array([0.25, -3.0], dtype=np.float32)
    Store(tmp_path).add(RUN, encode(scores), 1.5)
    [path] = (tmp_path / "runs").iterdir()
    path.write_text(path.read_text() + '\n{"key": "cut off", "setting": {"weight": 1}')
    found = Store(tmp_path)
    assert RUN in found
    np.testing.assert_array_equal(found.scores(RUN), scores)
    found.forget("BCE")
    assert RUN not in Store(tmp_path)
