"""The kernel of fp8_turned.py in Triton's interpreter against the plain torch twin: one JSON line a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_turned

A program of its own, because Triton reads that variable once, when a kernel is made. All numbers are ones of the
format before and after: the interpreter (3.7.1) rounds to fp8 wrongly, 0.49 to 0.25.
"""

import json

import torch

from backends.kernels import fp8_turned
from backends.kernels.fp8 import E4M3, E5M2, power_of_two

CASES = {
    "fp8 by row": (256, 144, E5M2, E5M2, True),
    "fp8 under one scale": (48, 272, E4M3, E4M3, False),
    "a weight": (144, 128, torch.float32, E4M3, False),
    "fewer than a tile": (16, 32, E4M3, E4M3, True),
}


def agrees(rows: int, columns: int, given: torch.dtype, wanted: torch.dtype, by_row: bool) -> bool:
    torch.manual_seed(0)
    x = (torch.randint(4, 8, (rows, columns)) * (torch.randint(0, 2, (rows, columns)) - 0.5)).to(given)
    factor = power_of_two(torch.randint(-6, 1, (rows if by_row else 1, 1), dtype=torch.int32))
    expected = fp8_turned.turned(x, factor, wanted)
    fp8_turned.has_fp8_products = lambda device: True  # type: ignore[assignment]
    found = fp8_turned.turned(x, factor, wanted)
    fp8_turned.has_fp8_products = lambda device: False  # type: ignore[assignment]
    assert found.shape == expected.shape == (columns, rows)
    assert found.is_contiguous()
    return torch.equal(found.double(), expected.double())


def main() -> None:
    for name, case in CASES.items():
        print(json.dumps([name, agrees(*case)]))


if __name__ == "__main__":
    main()
