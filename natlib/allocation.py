"""Modules that are built on the meta device and draw their own weights afterwards.

So nothing is drawn from the global generator, and nothing twice. PyTorch's own ``Module.to_empty``
and its normal draw on the meta device run Python stand-ins of their kernels: the first takes 0.1 ms
a tensor, the second imports the compiler, which takes seconds in every process.
"""

from __future__ import annotations

import torch
from torch import nn


def embedding(rows: int, width: int) -> nn.Embedding:
    """Return an embedding without values of its own, on the current default device."""
    values = torch.empty(rows, width)
    made: nn.Embedding = nn.Embedding.from_pretrained(values, freeze=False)  # type: ignore[no-untyped-call]
    return made


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Give all parameters and buffers memory on ``device``; values are whatever stood there."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            setattr(part, name, nn.Parameter(empty, weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
