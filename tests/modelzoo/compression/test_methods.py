"""The methods against what they promise: least errors, known beforehand, on inputs of every kind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelzoo.compression.methods import METHODS, compress, measured_error
from modelzoo.compression.moments import Moments

KINDS = ["full", "rank-deficient", "zero columns", "few tokens", "equal eigenvalues", "constant"]


def inputs(kind: str, tokens: int, features: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, features, dtype=torch.float64) + torch.linspace(-1, 2, features)
    if kind == "rank-deficient":
        x = x[:, : max(1, features // 3)] @ torch.randn(max(1, features // 3), features, generator=generator).double()
    elif kind == "zero columns":
        x[:, ::2] = 0
    elif kind == "few tokens":
        x = x[: max(1, features // 2)]
    elif kind == "equal eigenvalues":
        x = torch.cat([torch.eye(features), -torch.eye(features)]).double() * 3
    elif kind == "constant":
        x = x[:1].expand(tokens, -1)
    return x


@st.composite
def problems(draw: st.DrawFn):
    """Weight, bias or None, the inputs themselves, their moments, and a rank."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    in_features, out_features = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_features, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    x = inputs(draw(st.sampled_from(KINDS)), draw(st.integers(1, 60)), in_features, generator)
    moments = Moments.empty(in_features)
    for part in x.split(draw(st.integers(1, 30))):
        moments.add(part)
    return weight, bias, x, moments, draw(st.integers(1, min(in_features, out_features)))


def error_on(x, weight, bias, factors) -> float:
    """E|y − ŷ|² by computing both for every token."""
    y, found = x @ weight.t(), x @ factors.weight_in.t() @ factors.weight_out.t()
    if bias is not None:
        y = y + bias
    if factors.bias is not None:
        found = found + factors.bias
    return float((y - found).square().sum(1).mean())


def size_of(x, weight, bias) -> float:
    y = x @ weight.t() + (0 if bias is None else bias)
    return float(y.square().sum(1).mean()) + 1e-12


@given(problem=problems(), method=st.sampled_from(sorted(METHODS)))
def test_the_error_from_moments_is_the_error_on_the_tokens(problem, method):
    weight, bias, x, moments, rank = problem
    factors = compress(method, weight, bias, moments, rank)
    assert factors.weight_in.shape == (rank, weight.shape[1])
    assert factors.weight_out.shape == (len(weight), rank)
    measured = measured_error(weight, bias, factors, moments)
    assert measured == pytest.approx(error_on(x, weight, bias, factors), rel=1e-9, abs=1e-9 * size_of(x, weight, bias))


@given(problem=problems(), method=st.sampled_from(["svd_llm", "mimic"]))
def test_the_error_is_known_before_anything_is_replaced(problem, method):
    weight, bias, x, moments, rank = problem
    factors = compress(method, weight, bias, moments, rank)
    measured = error_on(x, weight, bias, factors)
    assert factors.predicted == pytest.approx(measured, rel=1e-6, abs=1e-10 * size_of(x, weight, bias))


@given(problem=problems())
def test_each_method_is_at_least_as_good_as_the_one_before_it(problem):
    weight, bias, x, moments, rank = problem
    errors = {name: error_on(x, weight, bias, compress(name, weight, bias, moments, rank)) for name in METHODS}
    slack = 1e-9 * size_of(x, weight, bias)
    assert errors["mimic"] <= errors["svd_llm"] + slack
    assert errors["svd_llm"] <= min(errors["svd"], errors["asvd"]) + slack


@given(problem=problems(), method=st.sampled_from(sorted(METHODS)))
def test_with_all_ranks_the_layer_is_what_it_was(problem, method):
    weight, bias, x, moments, _ = problem
    factors = compress(method, weight, bias, moments, min(weight.shape))
    assert error_on(x, weight, bias, factors) <= 1e-9 * size_of(x, weight, bias)


@given(problem=problems())
def test_no_other_map_of_the_rank_is_better_than_mimic(problem):
    """Against gradient descent's neighbourhood: random small changes of the factors and the bias never help."""
    weight, bias, x, moments, rank = problem
    factors = compress("mimic", weight, bias, moments, rank)
    best = error_on(x, weight, bias, factors)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        changed = [
            each + 1e-3 * each.abs().max() * torch.randn(each.shape, generator=generator, dtype=torch.float64)
            for each in (factors.weight_in, factors.weight_out, factors.bias)
        ]
        other = type(factors)(*changed, spectrum=factors.spectrum)
        assert error_on(x, weight, bias, other) >= best - 1e-9 * size_of(x, weight, bias)


def test_svd_llm_is_what_whitening_with_a_cholesky_factor_gives():
    """SVD(W L) truncated times L⁻¹, with L Lᵀ = E[xxᵀ], as the paper has it."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(7, 9, generator=generator).double(), inputs("full", 50, 9, generator)
    moments = Moments.empty(9)
    moments.add(x)
    lower = torch.linalg.cholesky(moments.uncentred)
    left, values, right = torch.linalg.svd(weight @ lower)
    published = left[:, :4] * values[:4] @ right[:4] @ torch.linalg.inv(lower)
    factors = compress("svd_llm", weight, None, moments, 4)
    torch.testing.assert_close(factors.weight_out @ factors.weight_in, published, rtol=1e-9, atol=1e-9)


def test_components_are_as_long_in_one_factor_as_in_the_other():
    generator = torch.Generator().manual_seed(2)
    weight, moments = torch.randn(8, 5, generator=generator).double(), Moments.empty(5)
    moments.add(inputs("full", 40, 5, generator))
    for method in METHODS:
        factors = compress(method, weight, None, moments, 3)
        torch.testing.assert_close(factors.weight_in.norm(dim=1), factors.weight_out.norm(dim=0))


def test_moments_of_parts_are_those_of_the_whole_in_any_dtype():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    whole, parts = Moments.empty(6), [Moments.empty(6) for _ in range(4)]
    whole.add(x.view(3, 100, 6))
    for number, part in enumerate(x.split(75)):
        parts[number].add(part)
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].count == whole.count == 300
    exact = x.double()
    torch.testing.assert_close(parts[0].covariance, torch.cov(exact.t(), correction=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[0].mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.mean_magnitude, exact.abs().mean(0), rtol=1e-12, atol=1e-12)
