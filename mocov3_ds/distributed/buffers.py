"""Which buffers of a module are state, and which are tables that its constructor makes again?"""

from collections.abc import Iterator

from torch import Tensor, nn


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each buffer that a state dict holds, in the module's order."""
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in child._non_persistent_buffers_set:
                yield name, buffer
