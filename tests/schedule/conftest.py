"""What the family's tests share."""

import pytest

from anabranch.schedule import proof


@pytest.fixture(scope="session")
def executed():
    """`executed("zb_h1(4, 8)", …)`: what came of running these schedules on virtual devices, by name."""
    return proof.run
