"""A chunk of the head on one GPU, compiled as in an artifact, with the kernel for its loss and with plain operators.

    python benchmarks/head_kernel.py

Milliseconds from replays of a CUDA graph, the peak of memory beyond the inputs (logits in place are half of it), and
the error of the hidden states' gradient against float64.
"""

import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.step_kernels import SHAPES, Run, compiled, head_inputs, loss, microseconds, normal, plainly  # noqa: E402


def head_chunk(loss: Run) -> Run:
    """A chunk as `capture_head` has it, norm left out: loss, and the gradients of both factors of the logits."""

    def run(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            logits = torch.nn.functional.linear(*leaves)
            total, gradient = loss(logits, *rest)
            return total, *torch.autograd.grad(logits, leaves, gradient)

    return run


def measure(folder: Path) -> None:
    shapes = [(each.model, each.chunk, each.width, each.vocabulary) for each in SHAPES]
    ways = {"plain": plainly(loss), "kernel": loss}
    for (model, rows, width, vocabulary), (way, function) in itertools.product(shapes, ways.items()):
        torch.manual_seed(0)
        inputs = [normal(rows, width), normal(vocabulary, width), *head_inputs(rows, vocabulary)[1:]]
        run = compiled(head_chunk(function), inputs, folder)
        results = run(*inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = [each.clone() for each in run(*inputs)]
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        time = microseconds(run, inputs) / 1e3
        wide = [each.double() if each.is_floating_point() else each for each in (each[:99] for each in inputs)]
        wide[1] = inputs[1].double()
        exact = head_chunk(partial(loss, dtype=torch.float64))(*wide)[1]
        error = relative(results[1][:99], exact)
        print(
            f"{model:12}{rows}x{width}x{vocabulary} {way:8}{time:8.3f} ms, peak {peak:6.0f} MiB, "
            f"loss {results[0].item():.6f}, error of its gradient {error:.1e}",
            flush=True,
        )


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name))
