"""The fp8 linear layer in float64 from the formats' definition (arXiv 2209.05433, table 1), and how far it may be off.

Nothing of the code under test is used: numbers of a format are listed, scales found by `math.frexp`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    mantissa_bits: int
    bias: int
    largest: float

    @property
    def step(self) -> float:
        """Between numbers below the normal range."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def unit(self) -> float:
        """The largest relative error of a rounded normal number."""
        return 2.0 ** -(self.mantissa_bits + 1)

    def numbers(self) -> Tensor:
        """All that are not negative, ascending: the index of each is its code, even where its last bit is 0."""
        count = 2**self.mantissa_bits
        below = [self.step * i for i in range(count)]
        normal = [(1 + i / count) * 2.0 ** (e - self.bias) for e in range(1, 32) for i in range(count)]
        return torch.tensor([x for x in below + normal if x <= self.largest], dtype=torch.float64)

    def nearest(self, x: Tensor) -> Tensor:
        """x in float64 rounded to these numbers, ties to even codes."""
        numbers, size = self.numbers(), x.abs().clamp(max=self.largest)
        above = torch.searchsorted(numbers, size).clamp(max=len(numbers) - 1)
        below = (above - 1).clamp(min=0)
        up, down = numbers[above] - size, size - numbers[below]
        code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
        return numbers[torch.where(size == numbers[above], above, code)] * x.sign()


E4M3 = Format(mantissa_bits=3, bias=7, largest=448.0)
E5M2 = Format(mantissa_bits=2, bias=15, largest=57344.0)
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}


def exponents(x: Tensor, number: Format, by_row: bool) -> Tensor:
    """The smallest e >= -126 with max |x| <= largest · 2^e, for each row or for all: float64 [rows, 1] or [1, 1]."""
    largest = x.abs().amax(1 if by_row else (0, 1), keepdim=True)

    def smallest(amax: float) -> int:
        fraction, power = math.frexp(amax / number.largest)
        return -126 if amax == 0 else max(-126, power - (fraction == 0.5))

    return torch.tensor([[smallest(float(amax))] for amax in largest], dtype=torch.float64)


def rounded(x: Tensor, number: Format, exponent: Tensor) -> Tensor:
    return number.nearest(x * 2.0**-exponent) * 2.0**exponent


def linear(x: Tensor, weight: Tensor, by_row: bool) -> Tensor:
    """Y [T, N] for float64 X [T, K], W [N, K]."""
    x, weight = (rounded(one, E4M3, exponents(one, E4M3, by_row)) for one in (x, weight))
    return x @ weight.t()


def gradients(x: Tensor, weight: Tensor, grad: Tensor, by_row: bool, number: Format) -> tuple[Tensor, Tensor]:
    """dX and dW for the output's gradient `grad` [T, N] in the format `number`."""
    grad_exponent, x_exponent = exponents(grad, number, by_row), exponents(x, E4M3, by_row)
    grad, x = rounded(grad, number, grad_exponent), rounded(x, E4M3, x_exponent)
    grad_x = grad @ rounded(weight, E4M3, exponents(weight, E4M3, by_row=False))
    # brought to one scale: G 2^(x's exponent) again rounded to fp8 under the largest scale
    top = (grad_exponent + x_exponent).amax().reshape(1, 1)
    return grad_x, rounded(grad * 2.0**x_exponent, number, top).t() @ (x * 2.0**-x_exponent)


def rounding_bound(x: Tensor, number: Format, by_row: bool) -> Tensor:
    """What an element may be off by: its unit, or half a step under the scale of its row (or of all)."""
    return torch.maximum(x.abs() * number.unit, 2.0 ** exponents(x, number, by_row) * number.step / 2)


def product_bound(a: Tensor, a_bound: Tensor, b: Tensor, b_bound: Tensor) -> Tensor:
    """How far (a ± a_bound)(b ± b_bound) may be from a b."""
    return (a.abs() + a_bound) @ (b.abs() + b_bound) - a.abs() @ b.abs()


def bounds(x: Tensor, weight: Tensor, grad: Tensor, by_row: bool, number: Format) -> tuple[Tensor, Tensor, Tensor]:
    """How far Y, dX and dW may be from the plain products."""
    of_x, of_weight = rounding_bound(x, E4M3, by_row), rounding_bound(weight, E4M3, by_row)
    of_grad = rounding_bound(grad, number, by_row)
    y = product_bound(x, of_x, weight.t(), of_weight.t())
    grad_x = product_bound(grad, of_grad, weight, rounding_bound(weight, E4M3, by_row=False))
    x_exponent = exponents(x, E4M3, by_row)
    top = (exponents(grad, number, by_row) + x_exponent).amax()
    again = of_grad + 2.0 ** (top - x_exponent) * number.step / 2
    return y, grad_x, product_bound(grad.t(), again.t(), x, of_x)
