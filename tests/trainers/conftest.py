"""Keeps the many small runs of these tests quick."""

import gc
from collections.abc import Iterator

import pytest

from tests.trainers import build


@pytest.fixture(scope="session", autouse=True)
def long_lived_imports() -> Iterator[None]:
    """Spare the garbage collector what the imports left: each run of a trainer collects."""
    build.tokenizer()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
