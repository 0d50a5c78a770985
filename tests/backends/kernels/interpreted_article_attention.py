"""Article attention's kernels in Triton's interpreter against float64 and a dense mask: a JSON line of errors a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_article_attention

A program of its own, because Triton reads that variable once, when a kernel is made. In float32: bfloat16 is wrong
there.
"""

import copy
import json

import torch
from torch import Tensor

from backends import dense
from backends.articles import article_spans, mask_of_spans
from backends.kernels import article_attention as kernels
from tests.backends.kernels.article_reference import masked_attention
from tests.modelzoo.llamas import llama_config, relative_error, twins

CASES = {
    # batch, heads, key heads, tokens, chance that a token opens an article
    "whole tiles": (2, 4, 2, 64, 0.1),
    "odd length": (1, 8, 1, 37, 0.05),
    "heads packed by two, three units": (2, 6, 1, 70, 0.1),
    "heads that cannot be packed": (1, 3, 1, 41, 0.1),
    "more heads than are packed": (1, 16, 1, 35, 0.1),
    "no heads shared": (1, 2, 2, 90, 0.03),
    "one token": (1, 2, 1, 1, 0.5),
    "one article a row": (1, 2, 2, 90, 0.0),
    "articles of one token": (1, 4, 2, 37, 1.0),
    "short articles": (2, 2, 1, 80, 0.6),
}


def errors(shape: tuple[int, int, int, int, float], seed: int = 0) -> dict[str, float]:
    """Largest absolute errors; values and gradients are of the order of one."""
    batch, heads, groups, tokens, chance = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        # as projections lay heads out, and for k as a cache would
        torch.randn(batch, tokens, number, 16, generator=generator).transpose(1, 2)
        for number in (heads, groups, groups, heads)
    )
    leaves = [each.requires_grad_() for each in (q, k.contiguous(), v)]
    ids = (torch.rand(batch, tokens, generator=generator) < chance).cumsum(1)
    spans = article_spans(ids)
    out = kernels.article_attention(*leaves, spans, 0.3)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    return dict(zip(("out", "q", "k", "v"), _largest(found, leaves, grad, mask_of_spans(spans)), strict=True))


def _largest(found: list[Tensor], leaves: list[Tensor], grad: Tensor, mask: Tensor) -> list[float]:
    wide = [each.detach().double().requires_grad_() for each in leaves]
    out = masked_attention(*wide, mask, 0.3)
    expected = [out, *torch.autograd.grad(out, wide, grad.double())]
    return [float((a - b.detach()).abs().max()) for a, b in zip(found, expected, strict=True)]


def model_errors() -> dict[str, float]:
    """Relative, of a model's logits and parameter gradients: its parts one by one, beside its forward in float64."""
    torch.manual_seed(0)
    _, model = twins(llama_config(num_key_value_heads=2, head_dim=16))
    wide = copy.deepcopy(model).double()
    input_ids, article_ids = torch.randint(0, 61, (2, 40)), (torch.rand(2, 40) < 0.1).cumsum(1)
    stages, (cos, sin) = model.stages(), model.rotary_tables(40)
    hidden_states = model.get_submodule(stages.embed)(input_ids)
    for block in stages.blocks:
        hidden_states = model.get_submodule(block)(hidden_states, cos, sin, article_spans(article_ids))
    logits = model.get_submodule(stages.head)(model.get_submodule(stages.norm)(hidden_states))
    expected, grad = wide(input_ids, article_ids=article_ids).logits, torch.randn(logits.shape)
    pairs = [(logits, expected)]
    found = torch.autograd.grad(logits, list(model.parameters()), grad)
    pairs += zip(found, torch.autograd.grad(expected, list(wide.parameters()), grad.double()), strict=True)
    return {str(number): relative_error(a.double(), b) for number, (a, b) in enumerate(pairs)}


def use(tiles: kernels.Tiles) -> None:
    """So small that a sequence has several tiles of each kind: masked at either end, whole, cut by the row's end."""
    kernels.forward_tiles = kernels.grad_query_tiles = kernels.grad_key_tiles = lambda _: tiles  # type: ignore[assignment]


def main() -> None:
    use(kernels.Tiles(32, 16, 4, 1))
    for case, shape in CASES.items():
        print(json.dumps([case, errors(shape)]), flush=True)
    use(kernels.Tiles(16, 32, 4, 1, False))
    dense.has_article_kernels = lambda *_: True  # type: ignore[assignment]
    print(json.dumps(["a model", model_errors()]), flush=True)
    for seed in range(9):
        use(kernels.Tiles(16, 32, 4, 1, split=seed % 2 == 0))
        chance = (0.02, 0.1, 0.3)[seed % 3]
        print(json.dumps([f"layout {seed}", errors((1, 4, 2, 49 + seed, chance), seed)]), flush=True)


if __name__ == "__main__":
    main()
