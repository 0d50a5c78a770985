"""FLOPs read off a graph against torch's own counter on the running function."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from compiled import lowering
from compiled.flops import count_flops

SIZES = st.integers(1, 9)


def counted(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[int, int]:
    """(ours, torch's)."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return count_flops(lowering.trace(function, inputs)), counter.get_total_flops()


@given(SIZES, SIZES, SIZES)
def test_a_matrix_product_is_2mkn(m: int, k: int, n: int) -> None:
    ours, theirs = counted(lambda a, b: (a @ b,), torch.ones(m, k), torch.ones(k, n))
    assert ours == theirs == 2 * m * k * n


def test_a_product_of_fp8_operands_is_2mkn() -> None:
    def product(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16),)

    a, b = (torch.ones(rows, 32).to(torch.float8_e4m3fn) for rows in (16, 48))
    ours, theirs = counted(product, a, b, torch.ones(()))
    assert ours == theirs == 2 * 16 * 32 * 48


@given(SIZES, SIZES, SIZES, SIZES)
def test_batched_and_biased_products_are_counted_as_torch_counts_them(b: int, m: int, k: int, n: int) -> None:
    def products(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return torch.bmm(x, y), F.linear(x[0], weight, bias), torch.baddbmm(x.new_zeros(b, m, n), x, y)

    inputs = (torch.ones(b, m, k), torch.ones(b, k, n), torch.ones(n, k), torch.ones(n))
    ours, theirs = counted(products, *inputs)
    assert ours == theirs == 3 * b * 2 * m * k * n - (b - 1) * 2 * m * k * n


@given(SIZES, SIZES, SIZES)
def test_the_backward_of_a_layer_costs_twice_its_forward(tokens: int, inside: int, outside: int) -> None:
    def layer(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))

    ours, theirs = counted(layer, torch.ones(tokens, inside), torch.ones(outside, inside))
    assert ours == theirs == 3 * 2 * tokens * inside * outside


def attention(is_causal: bool, backward: bool) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if not backward:
            return (F.scaled_dot_product_attention(q, k, v, is_causal=is_causal),)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            y = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
            return torch.autograd.grad(y.sum(), leaves)

    return run


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 16]), st.booleans())
def test_causal_attention_counts_the_half_that_has_to_be_computed(
    batch: int, heads: int, half: int, width: int, is_causal: bool
) -> None:
    length = 2 * half
    inputs = [torch.ones(batch, heads, length, width) for _ in range(3)]
    forward = 2 * (2 * batch * heads * length * length * width) // (2 if is_causal else 1)
    assert count_flops(lowering.trace(attention(is_causal, backward=False), inputs)) == forward
    assert count_flops(lowering.trace(attention(is_causal, backward=True), inputs)) == forward + forward * 5 // 2


def test_elementwise_work_is_not_counted() -> None:
    assert count_flops(lowering.trace(lambda x: (x.exp() + x.softmax(-1), x.sum()), [torch.ones(4, 4)])) == 0


def test_an_operator_of_our_own_counts_what_its_author_registered() -> None:
    @torch.library.custom_op("substrate_test::twice", mutates_args=())
    def twice(x: Tensor, times: int) -> Tensor:
        return x * times

    @twice.register_fake
    def _(x: Tensor, times: int) -> Tensor:
        return torch.empty_like(x)

    def graph() -> GraphModule:
        return lowering.trace(lambda x: (torch.ops.substrate_test.twice(x, 3),), [torch.empty(4, 5)])

    assert count_flops(graph()) == 0

    @register_flop_formula(torch.ops.substrate_test.twice)
    def flops(x: tuple[int, ...], times: int, **_: object) -> int:
        return x[0] * x[1] * times

    assert count_flops(graph()) == 4 * 5 * 3
