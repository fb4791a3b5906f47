from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.batches", "tests.contract", "tests.contract_inputs")

from tests.gloo import GlooPool  # noqa: E402


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Four processes, started once for all objectives."""
    pool = GlooPool(4)
    yield pool
    pool.close()
