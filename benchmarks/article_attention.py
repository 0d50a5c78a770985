"""Attention inside articles on one GPU: errors, time beside plain causal attention, and launch configurations.

    python benchmarks/article_attention.py [check|time|tiles ...]

Rows are packed with articles of random lengths, 512 tokens on average. `check`: against the masked products in float64,
relative errors, beside those of PyTorch's attention with the dense mask in bfloat16. `time`: forward, and forward +
backward, medians of replayed CUDA graphs, beside causal attention by PyTorch's kernels and by these on rows of one
article; `pairs`: the share of a causal row's pairs that articles leave. `tiles`: each kernel for several launch
configurations, which is how those in `backends/kernels/article_attention.py` are chosen.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from backends.articles import article_spans, mask_of_spans  # noqa: E402
from backends.kernels import article_attention as kernels  # noqa: E402

SHAPES = {  # batch, query heads, key heads, tokens, head_dim
    "TinyLlama": (8, 32, 4, 2048, 64),
    "Llama-2-7B": (4, 32, 32, 4096, 128),
}
MEAN_TOKENS = 512
CAUSAL = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def inputs(shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """q, k, v [B, heads, S, D] as the projections lay them out, and a gradient of the output."""
    batch, heads, groups, tokens, head_dim = shape
    made = [
        torch.randn(batch, tokens, each, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for each in (heads, groups, groups, heads)
    ]
    return [each.requires_grad_() for each in made[:3]], made[3]


def random_spans(batch: int, tokens: int, mean: float = MEAN_TOKENS) -> Tensor:
    """Spans of articles of which each token opens one with the chance that gives their mean length."""
    opens = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)) < 1 / mean
    return article_spans(opens.cumsum(1)).cuda()


def articles_of(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    return kernels.article_attention(q, k, v, spans, q.shape[-1] ** -0.5)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    if q.dtype == torch.float64:
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def check() -> None:
    print(f"{'relative error of':40}{'out':>10}{'dQ':>10}{'dK':>10}{'dV':>10}")
    for heads, groups, tokens, head_dim in ((8, 1, 2048, 64), (6, 2, 1999, 64), (4, 4, 4096, 128), (1, 1, 1, 128)):
        torch.manual_seed(1)
        given, grad = inputs((2, heads, groups, tokens, head_dim))
        spans = random_spans(2, tokens)
        mask = mask_of_spans(spans)
        wide = [each.detach().double().requires_grad_() for each in given]
        out = masked(*wide, mask)
        expected = [out, *torch.autograd.grad(out, wide, grad.double())]
        for name, found in (("kernels", articles_of(*given, spans)), ("dense mask", masked(*given, mask))):
            results = [found, *torch.autograd.grad(found, given, grad)]
            errors = [relative(a, b) for a, b in zip(results, expected, strict=True)]
            label = f"{name}, 2x{heads}/{groups}x{tokens}x{head_dim}"
            print(f"{label:40}" + "".join(f"{error:10.1e}" for error in errors), flush=True)
        again = torch.autograd.grad(articles_of(*given, spans), given, grad)
        once = torch.autograd.grad(articles_of(*given, spans), given, grad)
        assert all(torch.equal(a, b) for a, b in zip(again, once, strict=True)), "two runs differ"


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-6))


def measure() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"{'':12}{'':22}{'pairs':>8}{'forward':>12}{'with backward':>16}")
    for name, shape in SHAPES.items():
        given, grad = inputs(shape)
        for label, way in CAUSAL.items():
            with sdpa_kernel(way):
                line(name, f"causal, {label}", 1.0, causal, given, grad)
        for label, mean in (("causal, kernels", 1e9), ("articles, kernels", MEAN_TOKENS)):
            spans = random_spans(shape[0], shape[3], mean)
            line(name, label, share(spans), lambda *x, spans=spans: articles_of(*x, spans), given, grad)
        mask = mask_of_spans(spans)
        line(name, "articles, dense mask", share(spans), lambda *x, mask=mask: masked(*x, mask), given, grad)
        spent = timed(lambda ids=spans[0]: article_spans(ids))
        print(f"{name:12}{'spans, once a batch':22}{'':8}{spent:9.3f} ms", flush=True)


def share(spans: Tensor) -> float:
    """Pairs inside articles over those of causal rows."""
    tokens = spans.shape[-1]
    positions = torch.arange(1, tokens + 1, device=spans.device)
    return float((positions - spans[0]).sum() / (len(spans[0]) * positions.sum()))


def line(
    name: str, label: str, pairs: float, attention: Callable[..., Tensor], given: list[Tensor], grad: Tensor
) -> None:
    def both() -> Any:
        return torch.autograd.grad(attention(*given), given, grad)

    def forward() -> Any:
        with torch.no_grad():
            return attention(*given)

    print(f"{name:12}{label:22}{pairs:8.3f}{timed(forward):9.3f} ms{timed(both):13.3f} ms", flush=True)


def timed(work: Callable[[], Any]) -> float:
    from triton.testing import do_bench_cudagraph

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(do_bench_cudagraph(work, rep=100, return_mode="median"))


# packed rows, keys, warps, pipeline stages, whether tiles without a mask have their own loop; none spills on Hopper
TILES: dict[int, dict[str, list[tuple[int, int, int, int, bool]]]] = {
    64: {
        "forward_tiles": [
            (128, 64, 8, 3, True),
            (128, 64, 8, 3, False),
            (64, 64, 4, 3, True),
            (64, 64, 4, 3, False),
            (128, 64, 4, 3, True),
            (128, 128, 8, 2, True),
        ],
        "grad_query_tiles": [
            (64, 64, 4, 2, True),
            (64, 64, 4, 2, False),
            (64, 64, 4, 3, True),
            (128, 64, 8, 2, True),
            (128, 64, 8, 2, False),
        ],
        "grad_key_tiles": [
            (64, 128, 8, 2, True),
            (64, 128, 8, 2, False),
            (64, 64, 4, 2, True),
            (64, 64, 4, 2, False),
            (32, 64, 4, 3, True),
            (32, 128, 8, 2, True),
        ],
    },
    128: {
        "forward_tiles": [(128, 64, 8, 3, True), (128, 64, 8, 3, False), (128, 64, 8, 2, True), (64, 64, 4, 2, True)],
        "grad_query_tiles": [(128, 64, 8, 2, True), (128, 64, 8, 2, False), (64, 64, 4, 2, True)],
        "grad_key_tiles": [(32, 128, 8, 2, True), (32, 128, 8, 2, False), (32, 64, 4, 2, True), (32, 64, 4, 3, True)],
    },
}
KERNEL_OF = {
    "forward_tiles": "article_forward_kernel",
    "grad_query_tiles": "article_grad_query_kernel",
    "grad_key_tiles": "article_grad_key_kernel",
}


def try_tiles() -> None:
    for shape in SHAPES.values():
        given, grad = inputs(shape)
        spans = random_spans(shape[0], shape[3])
        for packed in (8, 2, 1):
            if packed <= kernels.packed_heads(*shape[1:3]):
                with replaced("packed_heads", packed):
                    print(shape, "packed heads", packed, kernel_times(given, grad, spans), flush=True)
        for function, choices in TILES[shape[4]].items():
            for choice in choices:
                with replaced(function, kernels.Tiles(*choice)):
                    try:
                        spent = kernel_times(given, grad, spans)[KERNEL_OF[function]]
                        print(shape, function, choice, f"{spent:.3f} ms", flush=True)
                    except Exception as error:  # a tile that does not fit: the next one may
                        print(shape, function, choice, type(error).__name__, str(error)[:90], flush=True)


@contextmanager
def replaced(function: str, value: Any) -> Iterator[None]:
    """`function` of the kernels' file gives `value` inside."""
    before = getattr(kernels, function)
    setattr(kernels, function, lambda *_: value)
    yield
    setattr(kernels, function, before)


def kernel_times(given: list[Tensor], grad: Tensor, spans: Tensor) -> dict[str, float]:
    """Milliseconds of each kernel, the mean of ten."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        torch.autograd.grad(articles_of(*given, spans), given, grad)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(10):
            torch.autograd.grad(articles_of(*given, spans), given, grad)
        torch.cuda.synchronize()
    found = {each.key: each.device_time_total / each.count / 1e3 for each in record.key_averages()}
    return {name: round(found[name], 4) for name in KERNEL_OF.values()}


def main() -> None:
    parts = {"check": check, "time": measure, "tiles": try_tiles}
    for name in sys.argv[1:] or ["check", "time"]:
        parts[name]()


if __name__ == "__main__":
    main()
