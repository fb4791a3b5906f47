"""The statistic that sampled tokens are tested by, as in the tests of rollouts."""

from tests.rollout.conftest import chi_square as chi_square
