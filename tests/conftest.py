"""Fixtures shared by the tests."""

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool():
    workers = Pool()
    yield workers
    workers.close()
