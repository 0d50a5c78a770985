import types

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from backends.dense import Dense


def hugging_face(q, k, v, mask, scale):
    module = types.SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scale)
    return out.transpose(1, 2)


def ours(q, k, v, mask, scale):
    return Dense().attention(q, k, v, mask=mask, scale=scale, is_causal=True, state={})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_bit_identical_to_hugging_face_forward_and_backward(dtype, groups, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 37, 16, generator=generator).to(dtype).requires_grad_()
    k, v = (torch.randn(2, groups, 37, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    articles = torch.arange(37)[None] // torch.tensor([[9], [20]])
    mask = (articles[:, None, :, None] == articles[:, None, None, :]) & torch.ones(37, 37).tril().bool()
    results = []
    for attention in (ours, hugging_face):
        out = attention(q, k, v, mask if masked else None, 0.25)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("groups", [2, 6])
def test_one_query_decodes_against_the_whole_cache_as_in_hugging_face(groups):
    q, k, v = torch.randn(2, 6, 1, 16), torch.randn(2, groups, 9, 16), torch.randn(2, groups, 9, 16)
    assert torch.equal(ours(q, k, v, None, 0.25), hugging_face(q, k, v, None, 0.25))


def test_the_empty_tail_of_a_preallocated_cache_is_not_attended():
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    assert torch.equal(ours(q, k, v, None, 0.25), ours(q, k[:, :, :5], v[:, :, :5], None, 0.25))
    assert torch.equal(ours(q, k, v, None, 0.25), hugging_face(q, k, v, None, 0.25))


def test_key_and_value_heads_may_differ_in_size():
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    repeated = F.scaled_dot_product_attention(
        q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=True, scale=0.25
    )
    torch.testing.assert_close(ours(q, k, v, None, 0.25), repeated)


def test_linear_and_matmul_are_those_of_torch():
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(Dense().linear(x, weight, bias, {})[0], F.linear(x, weight, bias))
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)
    assert torch.equal(Dense().matmul(a, b, {})[0], a @ b)


@pytest.mark.parametrize("length", [37, 513])  # composed, flash
@pytest.mark.parametrize("masked", [False, True])
def test_training_in_bfloat16_is_as_exact_as_the_flash_kernel(length, masked):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, length, 16, generator=generator).bfloat16().requires_grad_()
    k, v = (torch.randn(2, 2, length, 16, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    mask = torch.ones(length, length).tril().triu(-9).bool().expand(2, 1, -1, -1) if masked else None

    def errors(attention, training):
        def results(*tensors):
            out = attention(*tensors, mask=mask, scale=0.25, is_causal=True, state={}, training=training)[0]
            return (out, *torch.autograd.grad(out.square().sum(), tensors))

        exact = results(*(tensor.detach().double().requires_grad_() for tensor in (q, k, v)))
        pairs = zip(results(q, k, v), exact, strict=True)
        return torch.stack([(ours.double() - theirs).norm() / theirs.norm() for ours, theirs in pairs])

    attention = Dense().attention
    assert (errors(attention, True) < 2 * errors(attention, False)).all()
    assert (errors(attention, True) < 0.02).all()


def test_training_takes_the_flash_kernel_where_it_is_faster(monkeypatch):
    taken = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *_, **__: taken.append(q.shape[2]) or q)
    for length in (2, 512, 513):
        x = torch.randn(1, 1, length, 8, dtype=torch.bfloat16)
        Dense().attention(x, x, x, mask=None, scale=1.0, is_causal=True, state={}, training=True)
    assert taken == [513]
