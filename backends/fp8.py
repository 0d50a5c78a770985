"""fp8: linear layers whose products take 8-bit floating-point operands, forward and backward, with scales chosen from
each tensor as it comes.

docs/fp8.md has the formulas, what is not modelled, and what it costs; arXiv 2209.05433 the formats.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, Cost, State
from backends.kernels.fp8 import E4M3, E5M2
from backends.kernels.fp8_linear import Recipe, fp8_linear


class Fp8(Backend):
    """y = x Wᵀ, dX and dW as fp8 products; parameters, their gradients and everything between layers stay as they are.

    On an NVIDIA GPU from compute capability 8.9 on they run on its fp8 units, elsewhere the operands are rounded to
    the same fp8 numbers and multiplied in the compute dtype: the results agree but for the order of sums. No state,
    no calibration. A layer of any size runs: extents that are not multiples of 16 are padded with zeros.

    Attention's products are not computed here: they stay with `dense`, or whatever a rule says. Its weights and values
    are not rounded, for the softmax asks for more than three bits, and a fused dense kernel is the faster way.
    """

    gradient = "rounded"
    joins_rows: ClassVar[bool] = True
    source_modules: ClassVar[tuple[str, ...]] = (
        "backends.kernels.fp8",
        "backends.kernels.fp8_linear",
        "backends.kernels.fp8_turned",
        "backends.kernels.triton_functions",
    )

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of a rule.

        `scaling`: one scale for each row (token, output feature), or one for the tensor. `grad_format`: of the
        output's gradient; x and W are e4m3. `grad_weight`: dW as an fp8 product too, or in the compute dtype.
        `fast_accumulation`: in which products a GPU may keep fewer bits of a sum than float32 has.
        """

        scaling: Literal["row", "tensor"] = "row"
        grad_format: Literal["e5m2", "e4m3"] = "e5m2"
        grad_weight: Literal["fp8", "compute"] = "fp8"
        fast_accumulation: Literal["none", "forward", "all"] = "forward"

    config: Config

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        if x.numel() == 0 or weight.numel() == 0:
            return F.linear(x, weight, bias), state  # no largest number to take a scale from, and nothing to round
        y = fp8_linear(x, weight, self.recipe)
        return y if bias is None else y + bias, state

    @property
    def recipe(self) -> Recipe:
        """The options as the products take them."""
        config = self.config
        return Recipe(
            grad_dtype=E5M2 if config.grad_format == "e5m2" else E4M3,
            by_row=config.scaling == "row",
            fp8_grad_weight=config.grad_weight == "fp8",
            fast_forward=config.fast_accumulation != "none",
            fast_backward=config.fast_accumulation == "all",
        )

    def cost(self, m: int, k: int, n: int, *, itemsize: int = 4) -> Cost:
        """FLOPs of the dense product; bytes with operands that are read, written as fp8 and read again."""
        operands = (itemsize + 2.0) * (m * k + k * n)
        return dataclasses.replace(super().cost(m, k, n, itemsize=itemsize), bytes=operands + float(itemsize) * m * n)
