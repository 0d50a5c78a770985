"""The step's memory-bound kernels on one GPU, beside what Inductor makes of the plain operators they stand for.

    python benchmarks/step_kernels.py [time|tiles|head ...]

`time`: microseconds and the share of the bandwidth of a copy, from replays of a CUDA graph. A row's bytes are what has
to be read and written at least; inputs come from as many places as the L2 cache cannot hold. `tiles`: the kernels for
several launch configurations, which is how those in `backends/kernels` were chosen. `head`: a whole chunk of the head,
compiled as in an artifact, with either way to its loss: milliseconds, and the peak of memory beyond its inputs.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from backends.kernels import cross_entropy  # noqa: E402

L2 = 2**26
Run = Callable[..., Any]


@dataclass
class Case:
    """`ours` and `plain` take the inputs; `plain` is traced and compiled. `moved`: bytes read and written at least."""

    name: str
    inputs: list[Tensor]
    moved: int
    ours: Run
    plain: Run


def heads() -> Iterator[tuple[str, int, int, int]]:
    """Model, tokens of a chunk, width, vocabulary."""
    yield "TinyLlama", 8192, 2048, 32000
    yield "clm-60m", 4096, 384, 49152
    yield "Llama-2-7B", 8192, 4096, 32000


def head_inputs(rows: int, vocabulary: int) -> list[Tensor]:
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    return [logits, labels, torch.full((rows,), 1 / rows, device="cuda")]


def plain_loss(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The way of a device without a kernel."""
    from compiled.objective import loss_and_gradient

    known, cross_entropy.has_kernel = cross_entropy.has_kernel, lambda *_: False
    try:
        return loss_and_gradient(logits, torch.float32, labels, grad_scale, {})
    finally:
        cross_entropy.has_kernel = known


def loss_in_place(tile: int, warps: int) -> Run:
    """The kernel alone, as it runs in the head: over the logits themselves."""

    def run(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> None:
        entropies = torch.empty_like(grad_scale)
        cross_entropy.triton_cross_entropy.compiled_kernel()[(len(logits),)](
            logits, labels, grad_scale, grad_scale, grad_scale, entropies, entropies, logits.shape[1],
            tile, False, False, num_warps=warps,
        )  # fmt: skip

    return run


def cases() -> Iterator[Case]:
    for model, rows, _, vocabulary in heads():
        inputs = head_inputs(rows, vocabulary)
        ours = loss_in_place(*cross_entropy.tiles(vocabulary))
        yield Case(f"loss {model} {rows}x{vocabulary}", inputs, 2 * inputs[0].nbytes, ours, plain_loss)


def variants() -> Iterator[tuple[str, Case]]:
    """Launch configurations by name, each as the `ours` of a case."""
    for model, rows, _, vocabulary in heads():
        inputs = head_inputs(rows, vocabulary)
        for tile, warps in [(4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)]:
            case = Case(
                f"loss {model} {rows}x{vocabulary}",
                inputs,
                2 * inputs[0].nbytes,
                loss_in_place(tile, warps),
                plain_loss,
            )
            yield f"tile {tile}, {warps} warps", case


def compiled(function: Run, inputs: list[Tensor], folder: Path) -> Run:
    """`function` traced and lowered as a region of an artifact is."""
    from compiled import lowering
    from compiled.capture import Sources

    sources = Sources(lowering.fake_mode(), torch.device("cuda"))
    fakes = [sources.like(tensor) for tensor in inputs]
    path = folder / f"region-{len(list(folder.iterdir()))}"
    with lowering.attention_context("cuda"), lowering.quiet_torch():
        lowering.lower(lowering.trace(function, fakes), fakes, "cuda", path)
    loaded = lowering.load(path, "cuda")
    return lambda *tensors: loaded(list(tensors))


def microseconds(run: Run, inputs: list[Tensor]) -> float:
    """Median time of one call; the graph goes round copies of the inputs that no cache holds together."""
    from triton.testing import do_bench_cudagraph

    copies = -(-4 * L2 // sum(tensor.nbytes for tensor in inputs))
    sets = [inputs, *([tensor.clone() for tensor in inputs] for _ in range(copies - 1))]

    def all_sets() -> None:
        for each in sets:
            run(*each)

    all_sets()
    return do_bench_cudagraph(all_sets, rep=50, return_mode="median") * 1e3 / len(sets)


def copy_bandwidth() -> float:
    """Bytes a second of a copy: read and written."""
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda *_: target.copy_(source), [source]) * 1e6


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def measure(folder: Path) -> None:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, a copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    print(f"{'':44}{'Inductor':>18}{'ours':>18}   ratio")
    for case in cases():
        found = [microseconds(compiled(case.plain, case.inputs, folder), case.inputs)]
        found.append(microseconds(case.ours, case.inputs))
        texts = [f"{time:10.1f} us {case.moved / time * 1e6 / bandwidth:4.0%}" for time in found]
        print(f"{case.name:44}{texts[0]:>18}{texts[1]:>18}{found[0] / found[1]:8.2f}", flush=True)


def try_tiles(_: Path) -> None:
    bandwidth = copy_bandwidth()
    for name, case in variants():
        try:
            time = microseconds(case.ours, case.inputs)
        except Exception as error:  # a tile that does not fit: the next one may
            print(case.name, name, type(error).__name__, str(error)[:90], flush=True)
            continue
        print(f"{case.name:36}{name:28}{time:10.1f} us {case.moved / time * 1e6 / bandwidth:4.0%}", flush=True)


def head_chunk(loss: Run) -> Run:
    """A chunk as `capture_head` has it, norm left out: loss, and the gradients of both factors of the logits."""

    def run(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
            logits = torch.nn.functional.linear(*leaves)
            total, gradient = loss(logits, *rest)
            return total, *torch.autograd.grad(logits, leaves, gradient)

    return run


def measure_head(folder: Path) -> None:
    from compiled.objective import loss_and_gradient

    ways = {"plain": plain_loss, "kernel": lambda x, *rest: loss_and_gradient(x, torch.float32, *rest, {})}
    shapes = [*heads(), ("odd", 999, 256, 50257)]
    for (model, rows, width, vocabulary), (way, loss) in itertools.product(shapes, ways.items()):
        torch.manual_seed(0)
        inputs = [torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (rows, vocabulary)]
        inputs += head_inputs(rows, vocabulary)[1:]
        run = compiled(head_chunk(loss), inputs, folder)
        results = run(*inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = [each.clone() for each in run(*inputs)]
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        time = microseconds(run, inputs) / 1e3
        wide = [each.double() if each.is_floating_point() else each for each in (each[:99] for each in inputs)]
        wide[1] = inputs[1].double()
        exact = head_chunk(lambda x, *rest: loss_and_gradient(x, torch.float64, *rest, {}))(*wide)[1]
        error = relative(results[1][:99], exact)
        print(
            f"{model:12}{rows}x{width}x{vocabulary} {way:8}{time:8.3f} ms, peak {peak:6.0f} MiB, "
            f"loss {results[0].item():.6f}, error of its gradient {error:.1e}",
            flush=True,
        )


def main() -> None:
    parts = {"time": measure, "tiles": try_tiles, "head": measure_head}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ["time"]:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
