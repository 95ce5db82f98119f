import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Models of test size only lose by threads, badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
