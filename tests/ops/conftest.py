import pytest
import torch


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)  # which also switches filling on
    yield
    torch.use_deterministic_algorithms(False)
