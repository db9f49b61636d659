"""Every test runs on one thread, from the same seed, with deterministic kernels."""

import hypothesis
import pytest
import torch

# xdist starts a process for each core; with more threads they would only fight for them.
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

hypothesis.settings.register_profile("repository", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repository")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
