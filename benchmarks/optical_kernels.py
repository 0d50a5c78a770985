"""Optical linear and attention on one GPU, compiled as in an artifact: errors, and time and memory beside dense.

    python benchmarks/optical_kernels.py [check|time|tiles|passes ...]

`check` compares with the same products in float64: output in steps of its converter, gradients as relative errors.
`time` gives medians of forward + backward from CUDA events around replays of a CUDA graph, which is how a run calls
regions (else the small shapes time the launches), and the peak of memory beyond the inputs. `tiles` times the
attention kernels for several launch configurations, which is how those in `optical_attention_cuda.py` were chosen, and
`passes` those of the linear.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from backends import load  # noqa: E402
from backends.layers import BackendAttention, BackendLinear  # noqa: E402

LINEARS = [(8192, 2048, 2048), (8192, 2048, 5632), (12288, 384, 1408)]  # tokens, in, out
ATTENTIONS = [(8, 32, 4, 2048, 64), (16, 6, 2, 2048, 64)]  # batch, heads, key heads, tokens, head_dim


class Products(BackendAttention):
    """An attention layer that is its two products only."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.attend(q, k, v, mask=None, scale=self.head_dim**-0.5)


def linear_case(backend: str, shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, Tensor]]:
    tokens, inputs, outputs = shape
    layer = BackendLinear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.set_backend(load(backend))
    return layer.train(), {"x": torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)}


def attention_case(backend: str, shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, Tensor]]:
    batch, heads, groups, tokens, head_dim = shape
    layer = Products(heads, head_dim)
    layer.set_backend(load(backend))
    sizes = {"q": heads, "k": groups, "v": groups}
    return layer.cuda().train(), {
        name: torch.randn(batch, tokens, size, head_dim, device="cuda", dtype=torch.bfloat16)
        for name, size in sizes.items()
    }


def compiled_step(
    layer: nn.Module, inputs: dict[str, Tensor], folder: Path
) -> tuple[Callable[[Tensor], dict[str, Tensor]], Tensor]:
    """Forward and backward regions of the layer as one function from the output's gradient to all their results, and
    a random gradient: a region takes it in the layout of its own output only."""
    from compiled import lowering
    from compiled.capture import Sources, capture_stage
    from compiled.lowering_attention import attention_context
    from compiled.stages import stage_of

    stage = stage_of("", layer, {id(parameter): name for name, parameter in layer.named_parameters()}, {"": ""})
    sources = Sources(lowering.fake_mode(), torch.device("cuda"))
    fakes = {name: sources.like(tensor, requires_grad=True) for name, tensor in inputs.items()}
    with attention_context("cuda"), lowering.quiet_torch():
        regions = capture_stage("layer", stage, fakes, sources)
    runs = []
    for index, region in enumerate(regions):
        assert region is not None
        path = folder / f"{type(layer).__name__}-{id(layer)}-{index}"
        lowering.lower(region.graph, region.inputs, "cuda", path)
        runs.append((region.spec, lowering.load(path, "cuda")))
    given = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **inputs}
    given = {name: tensor.detach() for name, tensor in given.items()}

    def step(grad: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {"grad_output": grad}
        for spec, run in runs:
            arguments = [(given | results)[one.name] for one in spec.inputs]
            results |= zip([one.name for one in spec.outputs], run(arguments), strict=True)
        return results

    wanted = next(one for one in runs[1][0].inputs if one.name == "grad_output")
    torch.manual_seed(1)
    random = torch.randn(wanted.shape, device="cuda", dtype=torch.bfloat16)
    return step, torch.empty_strided(wanted.shape, wanted.stride, device="cuda", dtype=torch.bfloat16).copy_(random)


def calibrate(layer: Any, inputs: dict[str, Tensor]) -> None:
    """One eager training step, so that every range is known."""
    with torch.no_grad():
        layer(**inputs)


def cases() -> Iterator[tuple[str, Callable[..., Any], tuple[int, ...]]]:
    for shape in LINEARS:
        yield "linear", linear_case, shape
    for shape in ATTENTIONS:
        yield "attention", attention_case, shape


def check(folder: Path) -> None:
    print(f"{'':34}{'output, steps: mean  max  flipped':>36}   gradients, relative")
    for kind, make, shape in cases():
        shape = (1, *shape[1:]) if kind == "attention" else (1024, *shape[1:])  # float64 needs the room
        torch.manual_seed(1)
        layer, inputs = make("optical", shape)
        calibrate(layer, inputs)
        step, grad = compiled_step(layer, inputs, folder)
        results = step(grad)
        wide = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
        state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        reference = layer.double()
        for name, buffer in state.items():
            getattr(reference, name).copy_(buffer)
        expected = reference(**wide)
        expected.backward(grad.double())
        level = (state["out_max"] - state["out_min"]).item() / 255
        error = (results["output"].double() - expected).abs() / level
        gradients = {name: tensor.grad for name, tensor in [*wide.items(), *reference.named_parameters()]}
        errors = [f"{name} {relative(results[f'grad_{name}'], value):.1e}" for name, value in gradients.items()]
        print(
            f"{kind:10}{'x'.join(map(str, shape)):24}{error.mean():20.3f}{error.max():6.2f}"
            f"{(error > 0.75).double().mean():9.4f}   {', '.join(errors)}",
            flush=True,
        )


def relative(value: Tensor, expected: Any) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def measure(folder: Path) -> None:
    print(torch.cuda.get_device_name())
    print(f"{'forward + backward':34}{'dense':>14}{'optical':>17}   ratio")
    for kind, make, shape in cases():
        figures = []
        for backend in ("dense", "optical"):
            layer, inputs = make(backend, shape)
            calibrate(layer, inputs)
            figures.append(timed(*compiled_step(layer, inputs, folder)))
        (dense, dense_peak), (optical, peak) = figures
        print(
            f"{kind:10}{'x'.join(map(str, shape)):24}{dense:7.3f} ms {dense_peak:4.0f}M{optical:9.3f} ms {peak:4.0f}M"
            f"{optical / dense:8.2f}",
            flush=True,
        )


def timed(step: Callable[[Tensor], Any], grad: Tensor) -> tuple[float, float]:
    """(median milliseconds, peak MiB beyond what is there before)."""
    from triton.testing import do_bench_cudagraph

    peak = peak_memory(step, grad)
    return do_bench_cudagraph(lambda: step(grad), rep=100, return_mode="median"), peak


def peak_memory(step: Callable[[Tensor], Any], grad: Tensor) -> float:
    """MiB that a step needs beyond what is there before."""
    step(grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(grad)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


TILES = {  # queries, keys, warps, pipeline stages
    "forward_tiles": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)],
    "grad_query_tiles": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)],
    "grad_key_tiles": [(32, 64, 4, 2), (16, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2)],
}
KERNEL_OF = {
    "forward_tiles": "attention_forward_kernel",
    "grad_query_tiles": "attention_grad_query_kernel",
    "grad_key_tiles": "attention_grad_key_kernel",
}


def try_tiles(_: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    import backends.kernels.optical_attention_cuda as kernels

    for shape in [*ATTENTIONS, (8, 32, 8, 2048, 128)]:
        layer, inputs = attention_case("optical", shape)
        calibrate(layer, inputs)
        grad = torch.randn_like(layer(**inputs))
        for tensor in inputs.values():
            tensor.requires_grad_()
        for function, choices in TILES.items():
            before = getattr(kernels, function)
            for choice in choices:
                setattr(kernels, function, lambda _, choice=choice: choice)
                try:
                    for _ in range(2):
                        layer(**inputs).backward(grad)
                    with profile(activities=[ProfilerActivity.CUDA]) as record:
                        for _ in range(5):
                            layer(**inputs).backward(grad)
                        torch.cuda.synchronize()
                    spent = [e for e in record.key_averages() if e.key == KERNEL_OF[function]]
                    print(
                        shape,
                        function,
                        choice,
                        f"{spent[0].device_time_total / spent[0].count / 1e3:.3f} ms",
                        flush=True,
                    )
                except Exception as error:  # a tile that does not fit: the next one may
                    print(shape, function, choice, type(error).__name__, str(error)[:90], flush=True)
            setattr(kernels, function, before)


PASSES = [  # programs, elements at a time, warps
    *((programs, 2048, 4) for programs in (1056, 2048, 4096, 8192)),
    *((programs, block, warps) for programs in (2048, 4096) for block, warps in ((1024, 4), (4096, 4), (4096, 8))),
]


def try_passes(_: Path) -> None:
    """Microseconds, and TB/s read and written, of each pass of the linear; what the cache holds is not read again."""
    import backends.kernels.optical_linear_cuda as kernels

    kernels.register()
    for tokens, inputs, outputs in LINEARS:
        x, w = (torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16) for rows in (tokens, outputs))
        sums = torch.rand(tokens, outputs, device="cuda", dtype=torch.float16)
        for kernels.PROGRAMS, kernels.BLOCK, kernels.WARPS in PASSES:
            print(
                f"{tokens}x{inputs}x{outputs:<6}{(kernels.PROGRAMS, kernels.BLOCK, kernels.WARPS)!s:16}",
                "  ".join(pass_times(kernels, x, w, sums)),
                flush=True,
            )


def pass_times(kernels: Any, x: Tensor, w: Tensor, sums: Tensor) -> Iterator[str]:
    from triton.testing import do_bench_cudagraph

    ends = [torch.tensor(end, device="cuda") for end in (-4.5, 4.5, -4.5, 4.5, -200.0, 200.0)]
    zero, extreme = (
        torch.zeros((), dtype=torch.int64, device="cuda"),
        torch.empty(3, 2, kernels.PROGRAMS, device="cuda"),
    )
    given = ends, zero, zero, sums.shape[1], (1, 2), extreme, 256, x.dtype, True
    calls = (
        ("x", x, lambda: kernels.convert(x, ends[0:2], extreme, 0, 256, 0.0, True)),
        ("w", w, lambda: kernels.convert(w, ends[2:4], extreme, 1, 256, 0.02, True)),
        ("sums", sums, lambda: kernels.write_results(sums, None, *given)),
    )
    for name, tensor, call in calls:
        spent = do_bench_cudagraph(call, rep=50, return_mode="median")
        yield f"{name} {1e3 * spent:6.1f} us {4 * tensor.numel() / spent / 1e9:5.2f} TB/s"


def main() -> None:
    parts = {"check": check, "time": measure, "tiles": try_tiles, "passes": try_passes}
    chosen = sys.argv[1:] or ["check", "time"]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
