"""What torch is told to compute: operations, as a GPU would start a kernel for each of them."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = ("aten::detach", "aten::_unsafe_view")


class CountOperations(TorchDispatchMode):
    """Inside of it, counts operations that compute, by name; views do not."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if not operation.is_view and operation.name() not in NO_KERNEL:
            self.names[operation.name()] += 1
        return operation(*arguments, **(keywords or {}))


def operations_of(run) -> int:
    """How many operations a call needs, after one that is not counted."""
    run()
    with CountOperations() as counted, torch.enable_grad():
        run()
    return counted.names.total()
