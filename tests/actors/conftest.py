"""Served tiny models that most tests of this folder talk to; some files serve their own."""

import pytest
from support.serving import serving


@pytest.fixture(scope="module")
def shared():
    """For tests that leave it as they found it."""
    with serving() as served:
        yield served


@pytest.fixture
def served():
    """For one test alone, which may break it."""
    with serving() as served:
        yield served
