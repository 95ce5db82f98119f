"""How many operations a call is made of, which on a GPU is how often it launches a kernel."""

from torch.utils._python_dispatch import TorchDispatchMode

_NO_LAUNCH = ("empty", "new_empty", "empty_like")


class _Counter(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.number += not view and func.overloadpacket.__name__ not in _NO_LAUNCH
        return func(*args, **(kwargs or {}))


def operations(call):
    """Operations of ``call()``; views and allocations do not count."""
    with _Counter() as counter:
        call()
    return counter.number
