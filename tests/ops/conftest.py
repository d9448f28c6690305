import warnings

import pytest
import torch

from clara_fast.ops import _library


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so that an element nobody wrote does not pass by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*native CPU library.*")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "plain"], scope="module")
def backend(request):
    """Runs a module's tests on the native kernels, where they are, and again in plain PyTorch."""
    if request.param == "native" and not _library.native:
        pytest.skip("no native library")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(_library, "native", {})
        yield request.param
