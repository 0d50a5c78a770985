"""The kernels of inference in Triton's interpreter against plain operators: one JSON line a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_inference

A program of its own, because Triton reads that variable once, when a kernel is made. A line has the share of numbers
that differ, and by how many units in the last place at most. In float16: the interpreter cuts bfloat16 off where GPUs
round it.
"""

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

from backends.kernels import inference
from backends.kernels.rms_norm import rms_norm
from modelzoo.rotary import rotate
from tests.modelzoo.llamas import llama_config, twins

SHAPES = {"one token": (1, 1, 96), "an odd width": (2, 3, 33), "several rows": (2, 5, 128), "width one": (3, 2, 1)}
HEADS = {  # batch, heads, rows, channels, whether each row of the batch has its own positions
    "one token": (1, 4, 1, 16, False),
    "more heads than a tile": (2, 33, 3, 8, False),
    "ragged rows": (3, 5, 4, 12, True),
    "wide heads": (1, 2, 3, 160, True),
}


def difference(found: Tensor, expected: Tensor) -> list[float]:
    """(share of numbers that differ, most units in the last place)."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    ulps = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    return [float((ulps > 0).float().mean()), int(ulps.max())]


def report(kernel: str, case: str, compute: Callable[[], tuple[Tensor, ...]]) -> None:
    expected = compute()
    token = inference._device.set(torch.device("cpu"))
    found = compute()
    inference._device.reset(token)
    differences = [difference(a, b) for a, b in zip(found, expected, strict=True)]
    print(json.dumps([kernel, case, differences]), flush=True)


def norms(case: str, residual_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(case))
    x = torch.randn(SHAPES[case], generator=generator).to(residual_dtype)
    update = torch.randn(SHAPES[case], generator=generator).to(torch.float16)
    weight = (torch.rand(SHAPES[case][-1], generator=generator) + 0.5).to(torch.float16)

    options = (weight, 1e-5, torch.float32, torch.float16)

    def alone() -> tuple[Tensor]:
        return (rms_norm(x, *options),)

    def behind_a_sum() -> tuple[Tensor, ...]:
        fused, total = inference.add_rms_norm(x, update, *options), x + update.to(residual_dtype)
        total, normed = fused or (total, rms_norm(total, *options))
        assert total.dtype == residual_dtype
        return total.to(torch.float16), normed

    case = f"{case}, {residual_dtype}"
    report("norm", case, alone)
    report("sum and norm", case, behind_a_sum)


def rotations(case: str) -> None:
    batch, heads, rows, channels, ragged = HEADS[case]
    generator = torch.Generator().manual_seed(len(case))
    x = torch.randn(batch, rows, heads, channels, generator=generator).to(torch.float16).transpose(1, 2)
    angles = torch.randn(*((batch,) if ragged else ()), rows, channels, generator=generator)
    cos, sin = angles.cos().to(torch.float16), angles.sin().to(torch.float16)

    report("rotation", case, lambda: (rotate(x, cos, sin),))
    if not ragged:  # as generate() has them: positions [1, S]
        report("rotation", f"{case}, one row of angles", lambda: (rotate(x, cos[None], sin[None]),))


def gates(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    gate, up = (4 * torch.randn(3, size, generator=generator).to(torch.float16) for _ in range(2))

    def gated() -> tuple[Tensor]:
        found = inference.gated_silu(gate, up)
        return (F.silu(gate) * up if found is None else found,)

    report("gate", f"{size} columns", gated)


def model() -> None:
    """A whole Llama that reads a prompt and one more token, with a cache of fixed size."""
    torch.manual_seed(0)
    llama = twins(llama_config(), torch.float16)[1]
    prompt, token = torch.randint(0, llama.config.vocab_size, (2, 7)), torch.tensor([[3], [5]])

    def logits() -> tuple[Tensor, ...]:
        cache = StaticCache(config=llama.config, max_cache_len=12)
        positions = torch.arange(8)[None]
        first = llama(prompt, past_key_values=cache, position_ids=positions[:, :7]).logits
        return first, llama(token, past_key_values=cache, position_ids=positions[:, 7:]).logits

    report("model", "prompt and token", logits)


def main() -> None:
    for case in SHAPES:
        norms(case, torch.float16)
    norms("several rows", torch.float32)
    for case in HEADS:
        rotations(case)
    for size in (1, 33, 700):
        gates(size)
    model()


if __name__ == "__main__":
    with torch.no_grad():
        main()
