import pytest
import torch
from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("more", max_examples=1000, deadline=None)
settings.load_profile("quick")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
