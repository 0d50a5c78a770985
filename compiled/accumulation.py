"""Gradients of a step's microbatches on their way into one."""

import torch
from torch import Tensor

from compiled.reduction import Gradients, addend


class Accumulation:
    """Sums groups of gradients in at least float32; `leaves_pairs`: two of a kind are left to the update to add."""

    def __init__(self, *, leaves_pairs: bool = False) -> None:
        self._leaves_pairs = leaves_pairs
        self._groups: dict[int, Gradients] = {}

    def add(self, group: int, gradients: Gradients) -> None:
        """Keep a group's gradients of a microbatch that is not the last; empty where all of the group is frozen."""
        if group in self._groups:
            assert not self._leaves_pairs  # of three, two would be summed in their own dtype
            self._add_to(self._groups[group], gradients)
        elif self._leaves_pairs:
            self._groups[group] = gradients
        else:
            wide = {name: gradient.to(accumulation_dtype(gradient.dtype)) for name, gradient in gradients.items()}
            self._groups[group] = apart(wide)

    def finish(self, group: int, gradients: Gradients) -> Gradients:
        """All of a step's gradients of a group, now that the last microbatch's are there; forgets them."""
        before = self._groups.pop(group, None)
        if before is None:
            return gradients
        if self._leaves_pairs:
            return before | {addend(name): gradient for name, gradient in gradients.items()}
        self._add_to(before, gradients)
        return before

    def _add_to(self, sums: Gradients, gradients: Gradients) -> None:
        if gradients:
            torch._foreach_add_(list(sums.values()), list(gradients.values()))


def apart(tensors: Gradients) -> Gradients:
    """The same tensors, to be written to one by one: of those that share memory all but one are copies.

    A region gives one result twice where two are equal, as the gradients of A and B are where A + B is the weight.
    """
    found, end = dict(tensors), 0
    for name, each in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if each.numel() and each.data_ptr() < end:
            found[name] = each.clone()
        reach = sum((extent - 1) * step for extent, step in zip(each.shape, each.stride(), strict=True)) + 1
        end = max(end, each.data_ptr() + reach * each.element_size())
    return found


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gradients that are summed (over chunks, microbatches) are summed in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def total(losses: list[Tensor]) -> Tensor:
    """The sum of parts of a loss, all of one shape."""
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
