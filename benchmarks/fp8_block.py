"""A block of Llama-2-7B with fp8 products on one GPU, compiled as in an artifact, beside dense and its floor.

    python benchmarks/fp8_block.py [time|products|turn ...]

4 × 4096 tokens, bfloat16. `time`: forward + backward, medians of replayed CUDA graphs, which is how a run calls its
regions, and the peak of memory beyond the inputs. The floor is the block's bfloat16 products by cuBLAS and causal
attention by the fastest of PyTorch's kernels, each measured alone in the same process, and nothing else. `products`:
each product in bfloat16 and in fp8, with scales of tensors and of rows, with and without fast accumulation. `turn`: the
kernel that turns a matrix for several tiles, which is how those in `fp8_turned.py` are chosen, beside a copy.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from apps.training.floor_timing import Stopwatch  # noqa: E402
from backends import route  # noqa: E402
from backends.kernels import fp8_turned  # noqa: E402
from backends.kernels.fp8 import E4M3, E5M2  # noqa: E402
from benchmarks.optical_kernels import timed  # noqa: E402

BATCH, LENGTH, WIDTH, INSIDE, HEADS = 4, 4096, 4096, 11008, 32
TOKENS, HEAD_DIM = BATCH * LENGTH, WIDTH // HEADS
PRODUCTS = {
    "q, k, v": (WIDTH, 3 * WIDTH),
    "o": (WIDTH, WIDTH),
    "gate, up": (WIDTH, 2 * INSIDE),
    "down": (INSIDE, WIDTH),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"use": "dense"},
    "fp8": {"use": "fp8"},
    "fp8 fast_accumulation=all": {"use": "fp8", "fast_accumulation": "all"},
    "fp8 scaling=tensor": {"use": "fp8", "scaling": "tensor"},
    "fp8 grad_weight=compute": {"use": "fp8", "grad_weight": "compute"},
}


def compiled_block(rule: dict[str, Any], folder: Path) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    """Forward and backward regions as one function from the output's gradient to all results, and a random gradient."""
    from compiled import lowering
    from compiled.capture import Sources, capture_stage
    from compiled.joining import join
    from compiled.lowering_attention import attention_context
    from compiled.stages import stage_of
    from modelzoo.llama_block import ZooLlamaDecoderLayer
    from modelzoo.llama_config import ZooLlamaConfig
    from modelzoo.rotary import rotary_tables

    config = ZooLlamaConfig(hidden_size=WIDTH, intermediate_size=INSIDE, num_attention_heads=HEADS, num_hidden_layers=1)
    torch.manual_seed(1)
    with torch.device("cuda"):
        block = ZooLlamaDecoderLayer(config).to(torch.bfloat16).train()
    route(block, [{"match": "*", "only": "linear", **rule}])
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    stage = stage_of("", block, names, {"": ""})
    join(stage, block)
    cos, sin = rotary_tables(config, torch.arange(LENGTH, device="cuda"), torch.bfloat16, LENGTH)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16)
    given = {"hidden_states": hidden, "cos": cos, "sin": sin}
    sources = Sources(lowering.fake_mode(), torch.device("cuda"))
    fakes = {name: sources.like(tensor, requires_grad=name == "hidden_states") for name, tensor in given.items()}
    with attention_context("cuda"), lowering.quiet_torch():
        regions = capture_stage("block", stage, fakes, sources)
    runs = []
    for index, region in enumerate(regions):
        assert region is not None
        path = folder / f"{id(block)}-{index}"
        lowering.lower(region.graph, region.inputs, "cuda", path)
        runs.append((region.spec, lowering.load(path, "cuda")))
    parameters = {name: parameter.detach() for name, parameter in block.named_parameters()}
    for name, members in stage.tensors().items():
        given[name] = torch.cat([parameters[member] for member in members])

    def step(grad: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {"grad_output": grad}
        for spec, run in runs:
            arguments = [results[one.name] if one.name in results else given[one.name] for one in spec.inputs]
            results |= zip([one.name for one in spec.outputs], run(arguments), strict=True)
        return results

    return step, torch.randn_like(hidden) * 1e-4


def measure(folder: Path) -> None:
    watch = Stopwatch(torch.device("cuda"), torch.bfloat16)
    pieces = [watch.product(TOKENS, *widths) for widths in PRODUCTS.values()]
    products = 1e3 * sum(piece.forward + piece.backward for piece in pieces)
    attention = watch.attention(BATCH, HEADS, HEADS, LENGTH, HEAD_DIM)
    floor = products + 1e3 * (attention.forward + attention.backward)
    flops = 3 * 2 * TOKENS * sum(into * out for into, out in PRODUCTS.values())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"floor in bfloat16: {floor:.2f} ms, of which products {products:.2f} ({flops / products / 1e9:.0f} TFLOP/s)")
    print(f"{'forward + backward':28}{'ms':>8}{'MiB':>8}   of the floor's speed")
    for name, rule in VARIANTS.items():
        milliseconds, peak = timed(*compiled_block(rule, folder))
        print(f"{name:28}{milliseconds:8.2f}{peak:8.0f}{floor / milliseconds:8.3f}", flush=True)
        torch.cuda.empty_cache()


def fp8_ways(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """a bᵀ of fp8 a [M, K], b [N, K] under scales of tensors and of rows, exact and fast sums."""
    one = torch.ones((), device="cuda")
    rows = torch.ones(len(a), 1, device="cuda"), torch.ones(1, len(b), device="cuda")

    def product(scales: tuple[Tensor, Tensor], fast: bool) -> Tensor:
        return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {
        f"{kind}{' fast' if fast else ''}": lambda scales=scales, fast=fast: product(scales, fast)
        for kind, scales in {"tensor": (one, one), "row": rows}.items()
        for fast in (False, True)
    }


def try_products(_: Path) -> None:
    watch = Stopwatch(torch.device("cuda"), torch.bfloat16)
    print(f"{'ms':24}{'bfloat16':>12}{'tensor':>12}{'tensor fast':>12}{'row':>12}{'row fast':>12}   (M, N, K)")
    for name, (into, out) in PRODUCTS.items():
        shapes = {"forward": (TOKENS, out, into), "dX": (TOKENS, into, out), "dW": (out, into, TOKENS)}
        for which, (m, n, k) in shapes.items():
            left, right = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
            found = [watch.seconds(lambda left=left, right=right: left @ right.t())]
            wide = left.to(E4M3 if which == "forward" else E5M2)
            for way in fp8_ways(wide, right.to(E4M3)).values():
                found.append(watch.seconds(way))
            print(f"{name:14}{which:10}{''.join(f'{1e3 * each:12.3f}' for each in found)}   {m, n, k}", flush=True)


TILES = [
    (128, 128, 8),
    (128, 128, 4),
    (64, 128, 4),
    (128, 64, 4),
    (64, 64, 4),
    (256, 64, 8),
    (64, 256, 8),
    (128, 256, 8),
    (256, 128, 8),
]


def try_turning(_: Path) -> None:
    watch = Stopwatch(torch.device("cuda"), torch.bfloat16)
    print(f"a copy: {watch.copy_bytes_per_second / 1e12:.2f} TB/s; bytes read and written, in TB/s:")
    factor = torch.ones(TOKENS, 1, device="cuda")
    tensors = {"fp8 16384×11008": torch.randn(TOKENS, INSIDE, device="cuda").to(E5M2)}
    tensors["fp8 16384×4096"] = tensors["fp8 16384×11008"].view(torch.uint8)[:, :WIDTH].contiguous().view(E5M2)
    tensors["bf16 22016×4096"] = torch.randn(2 * INSIDE, WIDTH, device="cuda", dtype=torch.bfloat16)
    for name, tensor in tensors.items():
        scale = factor if tensor.dtype == E5M2 else factor[:1]
        wanted = E5M2 if tensor.dtype == E5M2 else E4M3
        for tile in TILES:
            fp8_turned.ROWS, fp8_turned.COLUMNS, fp8_turned.WARPS = tile
            spent = watch.seconds(lambda t=tensor, s=scale, w=wanted: fp8_turned.turned(t, s, w))
            print(f"{name:20}{tile!s:16}{tensor.numel() * (tensor.itemsize + 1) / spent / 1e12:8.2f}", flush=True)


def main() -> None:
    parts = {"time": measure, "products": try_products, "turn": try_turning}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or ["time", "products"]:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
