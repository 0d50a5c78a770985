import pytest
import torch

from backends.kernels.dither import indices, key_of, uniform
from backends.kernels.optical_attention import SCORES, VALUES, optical_attention
from backends.kernels.optical_product import DITHER, USES, Converters
from tests.backends.kernels import optical_reference as reference

B, H, G, S, D = 2, 4, 2, 5, 8
SCALE = D**-0.5
ZERO = torch.zeros((), dtype=torch.int64)
RANGES = {"q": (-2.0, 2.1), "k": (-1.9, 2.2), "v": (-2.0, 1.8), "scores": (-5.0, 6.0), "out": (-1.5, 1.4)}
CAUSAL = torch.ones(S, S).tril().bool()
ARTICLES = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 2]])
MASK = (ARTICLES[:, None, :, None] == ARTICLES[:, None, None, :]) & CAUSAL


def operands(dtype=torch.float64, queries=S, keys=S):
    return torch.randn(B, H, queries, D).to(dtype), *torch.randn(2, B, G, keys, D).to(dtype).unbind()


def converters(levels=256, lut_min=0.020040, photons=None):
    return Converters(levels, levels, lut_min, None, photons, 0)


def scalars(ranges) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(end, dtype=torch.float32) for pair in ranges.values() for end in pair)


def attend(q, k, v, mask=None, causal=True, ranges=RANGES, step=3, first_row=0, options=None, observe=False):
    return optical_attention(
        q,
        k,
        v,
        mask,
        SCALE,
        causal,
        scalars(ranges),
        ZERO + step,
        ZERO + first_row,
        options or converters(),
        observe=observe,
    )


def expected(q, k, v, allowed, levels=256, lut_min=0.020040):
    def dither(shape, product):
        key = key_of(0, product * USES + DITHER, ZERO + 3)
        return uniform(indices(shape, ZERO, shape[1] * shape[2] * shape[3]), key, torch.float64)

    queries, keys = q.shape[2], k.shape[2]
    exact = {
        name: tuple(float(torch.tensor(end, dtype=torch.float32)) for end in ends) for name, ends in RANGES.items()
    }
    xi_scores, xi_out = dither((B, H, queries, keys), SCORES), dither((B, H, queries, D), VALUES)
    return reference.attention(q, k, v, allowed, SCALE, exact, levels, lut_min, xi_scores, xi_out)


@pytest.mark.parametrize("case", ["causal", "articles", "all", "one query", "long cache"])
@pytest.mark.parametrize(("levels", "lut_min"), [(256, 0.020040), (16, None), (5, 0.2)])
def test_equals_the_formulas_written_element_by_element(case, levels, lut_min):
    q, k, v = operands(queries=1 if case == "one query" else S, keys=7 if case == "long cache" else S)
    full = torch.ones(B, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    allowed = {"articles": MASK, "all": full, "one query": full}.get(case, full.tril())
    mask = MASK if case == "articles" else None
    out, _ = attend(q, k, v, mask, causal=case != "all", options=converters(levels, lut_min))
    torch.testing.assert_close(out, expected(q, k, v, allowed, levels, lut_min)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes_stay_within_a_few_levels_of_float64(dtype):
    q, k, v = operands(dtype)
    exact = expected(q, k, v, torch.ones(B, 1, S, S, dtype=torch.bool) & CAUSAL)[0]
    got, _ = attend(q, k, v)
    # where a tie of the scores falls the other way, a weight moves by up to a level times the scale
    level = (RANGES["out"][1] - RANGES["out"][0]) / 255
    assert (got.double() - exact).abs().max() <= 4 * level + (2.0**-8 * 1.5 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("mask", [None, MASK])
def test_masked_keys_are_never_seen_whatever_they_hold(mask):
    q, k, v = operands()
    before, seen = attend(q, k, v, mask, observe=True)
    allowed = (CAUSAL if mask is None else mask).expand(B, 1, S, S)
    for query in range(S):
        hidden = ~allowed[:, 0, query]
        other_k, other_v = k.clone(), v.clone()
        for b in range(B):
            other_k[b, :, hidden[b]] += 100.0
            other_v[b, :, hidden[b]] -= 100.0
        after, seen_after = attend(q, other_k, other_v, mask, observe=True)
        assert torch.equal(after[:, :, query], before[:, :, query])
    assert len(seen) == len(seen_after) == 10


def test_the_range_of_the_scores_is_of_attended_unscaled_pairs():
    q, k, v = operands()
    unknown = dict.fromkeys(RANGES, (torch.inf, -torch.inf))
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, dim=1))
    for mask in (None, MASK):
        seen = attend(q, k, v, mask, ranges=unknown, observe=True)[1]
        attended = scores[(CAUSAL if mask is None else mask).expand_as(scores)]
        torch.testing.assert_close(torch.stack(seen[6:8]), torch.stack([attended.min(), attended.max()]).float())
    assert seen[:6] == tuple(end.float() for x in (q, k, v) for end in (x.min(), x.max()))


def test_ranges_of_scores_and_results_are_seen_before_clamping():
    q, k, v = operands()
    narrow = RANGES | {"scores": (-0.1, 0.1), "out": (-0.01, 0.01)}
    out, seen = attend(q, k, v, ranges=narrow, observe=True)
    assert out.abs().max() <= 0.01 + 1e-8
    assert seen[6] < -0.1 < 0.1 < seen[7]
    assert seen[8] < -0.01 < 0.01 < seen[9]


def test_a_query_that_may_attend_nothing_gets_the_level_of_zero():
    q, k, v = operands()
    mask = MASK.clone()
    mask[0, 0, 3] = False
    out, seen = attend(q, k, v, mask, ranges=RANGES | {"out": (-1.0, 1.0)}, options=converters(255), observe=True)
    assert out[0, :, 3].abs().max() < 1e-7
    assert all(end.isfinite() for end in seen)


def test_rows_of_the_batch_give_the_same_bits_whichever_worker_computes_them():
    q, k, v = operands()
    whole, _ = attend(q, k, v)
    dealt = [attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], first_row=b)[0] for b in range(B)]
    torch.testing.assert_close(torch.cat(dealt), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("photons", [None, 20.0])
def test_gradients_are_the_stated_formulas_with_the_weights_of_quantised_scores(mask, photons):
    q, k, v = (x.requires_grad_() for x in operands())
    out, _ = attend(q, k, v, mask, options=converters(16, photons=photons), observe=True)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), upstream)
    if photons is None:
        p = expected(q, k, v, (CAUSAL if mask is None else mask).expand(B, 1, S, S), levels=16)[1]
    else:  # the noise of the forward, brought back by v = 1 column by column with converters that show everything
        p = weights_seen_through_values(q, k, mask, converters(16, photons=photons))
    k_, v_ = (x.detach().repeat_interleave(H // G, dim=1) for x in (k, v))
    grad_p = upstream @ v_.mT
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * SCALE
    grad_k = (grad_scores.mT @ q.detach()).view(B, G, H // G, S, D).sum(2)
    grad_v = (p.mT @ upstream).view(B, G, H // G, S, D).sum(2)
    torch.testing.assert_close(got, (grad_scores @ k_, grad_k, grad_v), rtol=1e-6, atol=1e-9)


def weights_seen_through_values(q, k, mask, options):
    """P [B, H, S, S]: gradient of v for an upstream of one query at a time."""
    p = torch.zeros(B, H, S, S, dtype=torch.float64)
    for head in range(H):
        for query in range(S):
            v = torch.zeros(B, G, S, D, dtype=torch.float64, requires_grad=True)
            out, _ = attend(q.detach(), k.detach(), v, mask, options=options)
            (grad_v,) = torch.autograd.grad(out[:, head, query, 0].sum(), v)
            p[:, head, query] = grad_v[:, head // (H // G), :, 0]
    torch.testing.assert_close(p.sum(-1), torch.ones(B, H, S, dtype=torch.float64))
    return p


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward():
    q, k, v = (x.requires_grad_() for x in operands(queries=64, keys=64))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attend(q, k, v, causal=False)
    assert max(sizes) == q.numel()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_clamped_away(broken):
    q, k, v = operands()
    k[0, 0, 2, 3] = broken
    out, _ = attend(q, k, v)
    assert out[0, :2, 2:].isnan().all()
    assert out[0, :2, :2].isfinite().all()
    assert out[1].isfinite().all()
