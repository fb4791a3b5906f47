"""Training by AveragePrecision on real data: what it brings the true surrogate to."""

import numpy as np
import pytest

pytest.importorskip("sklearn.datasets")

from benchmarks.tabular.ap_oracle import ours, surrogate, train


def test_the_surrogate_is_the_share_of_the_loss_that_positives_make():
    scores, targets = np.array([2.0, 1.0, 0.0]), np.array([1, 0, 1])
    # of positive 2 only the pair with itself loses: 1 / 1; positive 0 loses 9, 4 and 1
    assert surrogate(scores, targets) == pytest.approx(-(1 / 1 + 10 / 14) / 2)


def test_with_the_prior_training_reaches_a_lower_surrogate_than_at_the_samplers_share():
    with_prior, without = train(ours(prior=True), seed=0), train(ours(prior=False), seed=0)
    assert with_prior <= -0.83
    assert with_prior <= without - 0.02
