"""The step's memory-bound kernels on one GPU, beside what Inductor makes of the plain operators they stand for.

    python benchmarks/step_kernels.py [time|tiles|TinyLlama|clm-60m|Llama-2-7B ...]

`time`: microseconds and the share of the bandwidth of a copy, from replays of a CUDA graph. A row's bytes are what has
to be read and written at least; inputs come from as many places as the L2 cache cannot hold. `tiles`: the kernels for
several launch configurations, which is how those in `backends/kernels` were chosen.
"""

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

from backends.kernels import cross_entropy, rms_norm  # noqa: E402
from modelzoo.rotary import rotate  # noqa: E402

L2 = 2**26
Run = Callable[..., Any]


Call = tuple[Run, list[Tensor]]  # what is timed, and what it is given


@dataclass
class Case:
    """`moved`: bytes read and written at least."""

    name: str
    moved: int
    ours: Call
    plain: Call


@dataclass
class Shape:
    """Tokens of a step and of a chunk of its head, and the model's sizes."""

    model: str
    batch: int
    length: int
    chunk: int
    width: int
    heads: int
    head_dim: int
    vocabulary: int


SHAPES = [
    Shape("TinyLlama", 8, 2048, 8192, 2048, 32, 64, 32000),
    Shape("clm-60m", 16, 2048, 4096, 384, 6, 64, 49152),
    Shape("Llama-2-7B", 4, 4096, 8192, 4096, 32, 128, 32000),
]


def head_inputs(rows: int, vocabulary: int) -> list[Tensor]:
    logits = torch.randn(rows, vocabulary, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    return [logits, labels, torch.full((rows,), 1 / rows, device="cuda")]


def plainly(function: Run) -> Run:
    """The same without kernels of ours, as it is on other devices."""

    def run(*tensors: Any) -> Any:
        known = cross_entropy.takes_kernels, rms_norm.takes_kernels
        cross_entropy.takes_kernels = rms_norm.takes_kernels = lambda _: False
        try:
            return function(*tensors)
        finally:
            cross_entropy.takes_kernels, rms_norm.takes_kernels = known

    return run


def loss(logits: Tensor, labels: Tensor, grad_scale: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    from compiled.objective import loss_and_gradient

    return loss_and_gradient(logits, dtype, labels, grad_scale, {})


def loss_in_place(tile: int, warps: int, stages: int) -> Run:
    """The kernel alone, as it runs in the head: over the logits themselves."""

    def run(logits: Tensor, labels: Tensor, grad_scale: Tensor) -> None:
        entropies = torch.empty_like(grad_scale)
        cross_entropy.triton_cross_entropy.compiled_kernel()[(len(logits),)](
            logits, labels, grad_scale, grad_scale, grad_scale, entropies, entropies, logits.shape[1],
            tile, stages, False, False, num_warps=warps,
        )  # fmt: skip

    return run


def norm_of_sum(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A block's second norm: the residual stream, and the same normalised."""
    total = x + delta
    return total, rms_norm.rms_norm(total, weight, 1e-5, torch.float32, x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
    """Queries [B, S, heads · head_dim] as they come from their projection."""
    return (rotate(x.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2), cos, sin),)


def rotated_by_autograd(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
    heads = x.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), -1)
    return (heads * cos.unsqueeze(-3) + turned * sin.unsqueeze(-3),)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def cases(folder: Path) -> Iterator[Case]:
    for each in SHAPES:
        inputs = head_inputs(each.chunk, each.vocabulary)
        ours, plain = loss_in_place(*cross_entropy.tiles(each.vocabulary)), compiled(plainly(loss), inputs, folder)
        yield Case(f"{each.model} loss", 2 * inputs[0].nbytes, (ours, inputs), (plain, inputs))
        x = normal(each.batch, each.length, each.width)
        ours, plain = (split(way(norm_of_sum), [x, x, x[0, 0]], folder, 3) for way in (lambda one: one, plainly))
        yield Case(f"{each.model} norm of a sum", 4 * x.nbytes, ours[0], plain[0])
        yield Case(f"{each.model} norm backward", 4 * x.nbytes, ours[1], plain[1])
        x = normal(each.batch, each.length, each.heads * each.head_dim)
        cos, sin = normal(each.length, each.head_dim), normal(each.length, each.head_dim)
        ours, plain = (split(way, [x, cos, sin], folder, 1) for way in (rotated, rotated_by_autograd))
        yield Case(f"{each.model} rotation", 2 * x.nbytes, ours[0], plain[0])
        yield Case(f"{each.model} rotation backward", 2 * x.nbytes, ours[1], plain[1])


def variants() -> Iterator[tuple[str, int, Call]]:
    """Kernels with launch configurations: name, bytes, what is timed."""
    for each in SHAPES:
        inputs = head_inputs(each.chunk, each.vocabulary)
        for tile in LOSS_TILES:
            yield f"{each.model} loss {tile}", 2 * inputs[0].nbytes, (loss_in_place(*tile), inputs)
        x = normal(each.batch, each.length, each.width)
        scale = torch.rand(*x.shape[:-1], 1, device="cuda")
        for tile in NORM_TILES[each.width]:
            yield f"{each.model} norm backward {tile}", 4 * x.nbytes, (norm_backward(tile), [x, x, x, x[0, 0], scale])


LOSS_TILES = [  # logits, warps, pipeline stages
    (4096, 4, 1), (4096, 8, 1), (4096, 8, 3), (8192, 8, 1), (8192, 16, 1), (8192, 16, 2), (16384, 16, 1),
    (16384, 32, 1),
]  # fmt: skip
NORM_TILES = {  # by width: rows, warps, programs at most, pipeline stages
    384: [(1, 1, 2112, 1), (2, 4, 1056, 1), (4, 4, 528, 1), (4, 4, 1056, 1), (4, 4, 528, 2), (4, 8, 1056, 1)],
    2048: [(1, 4, 528, 1), (1, 4, 1056, 1), (1, 8, 528, 1), (2, 8, 396, 1), (1, 4, 528, 3), (1, 8, 264, 3)],
    4096: [(1, 8, 396, 1), (1, 8, 528, 1), (1, 16, 264, 1), (1, 8, 264, 2), (1, 8, 264, 3), (1, 16, 264, 2)],
}  # fmt: skip


def norm_backward(tile: tuple[int, int, int, int]) -> Run:
    """The operator outside a graph, its sum of parts with it."""

    def run(grad: Tensor, residual: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> None:
        known, rms_norm.tiles = rms_norm.tiles, lambda _: tile
        rms_norm._register()
        try:
            rms_norm.rms_norm_backward(grad, residual, x, weight, scale, trains_weight=True)
        finally:
            rms_norm.tiles = known

    return run


def compiled(function: Run, inputs: list[Tensor], folder: Path) -> Run:
    """`function` traced and lowered as a region of an artifact is."""
    from compiled import lowering
    from compiled.lowering_attention import attention_context

    fakes = fakes_like(inputs)
    with attention_context("cuda"), lowering.quiet_torch():
        return lowered(lowering.trace(function, fakes), fakes, folder)


def split(function: Run, inputs: list[Tensor], folder: Path, trained: int) -> tuple[Call, Call]:
    """Forward and backward of `function` as a block's, with gradients for its first `trained` inputs."""
    from compiled import lowering

    fakes = [fake.requires_grad_(index < trained) for index, fake in enumerate(fakes_like(inputs))]
    with lowering.quiet_torch():
        joint = lowering.trace_joint(function, fakes)
        graphs = lowering.split_joint(joint, len(function(*inputs)))
        calls = []
        for graph in graphs:
            values = [lowering.node_value(node).detach() for node in graph.graph.nodes if node.op == "placeholder"]
            real = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda").normal_() for v in values]
            calls.append((lowered(graph, values, folder), real))
    return calls[0], calls[1]


def fakes_like(inputs: list[Tensor]) -> list[Tensor]:
    from compiled import lowering
    from compiled.capture import Sources

    sources = Sources(lowering.fake_mode(), torch.device("cuda"))
    return [sources.like(tensor) for tensor in inputs]


def lowered(graph: torch.fx.GraphModule, fakes: list[Tensor], folder: Path) -> Run:
    from compiled import lowering

    path = folder / f"region-{len(list(folder.iterdir()))}"
    lowering.lower(graph, fakes, "cuda", path)
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


def measure(folder: Path) -> None:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, a copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    print(f"{'':34}{'plain':>18}{'ours':>18}   ratio")
    for case in cases(folder):
        found = [microseconds(*case.plain), microseconds(*case.ours)]
        texts = [f"{time:10.1f} us {case.moved / time * 1e6 / bandwidth:4.0%}" for time in found]
        print(f"{case.name:34}{texts[0]:>18}{texts[1]:>18}{found[0] / found[1]:8.2f}", flush=True)


def try_tiles(_: Path) -> None:
    bandwidth = copy_bandwidth()
    for name, moved, call in variants():
        try:
            time = microseconds(*call)
        except Exception as error:  # a tile that does not fit: the next one may
            print(name, type(error).__name__, str(error)[:90], flush=True)
            continue
        print(f"{name:48}{time:10.1f} us {moved / time * 1e6 / bandwidth:4.0%}", flush=True)


def main() -> None:
    parts = {"time": measure, "tiles": try_tiles}
    if models := [each for each in SHAPES if each.model in sys.argv[1:]]:
        SHAPES[:] = models
    with tempfile.TemporaryDirectory() as folder:
        for name in [each for each in sys.argv[1:] if each in parts] or ["time"]:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
