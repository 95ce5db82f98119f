import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    """Models of this size only lose by threads, badly so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
