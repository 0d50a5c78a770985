"""mimic towards the dense model's outputs: what it promises, against the tokens themselves and against mimic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelzoo.compression.methods import compress
from modelzoo.compression.moments import Moments, TargetMoments
from modelzoo.compression.regression import error_towards_targets, regress, variance_of_targets
from tests.modelzoo.compression.test_methods import KINDS, inputs


@st.composite
def problems(draw: st.DrawFn):
    """Weight, bias or None, inputs x′, outputs y to aim at, moments, and a rank."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    in_features, out_features = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_features, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    x = inputs(draw(st.sampled_from(KINDS)), draw(st.integers(1, 60)), in_features, generator)
    size = draw(st.sampled_from([0.0, 0.01, 1.0]))
    mixed = x @ torch.randn(in_features, out_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(x), out_features, generator=generator, dtype=torch.float64)
    wanted = size * (0.3 * mixed + noise + 0.5)
    y = x @ weight.t() + wanted + (0 if bias is None else bias)
    rank = draw(st.integers(1, min(in_features, out_features)))
    return weight, bias, x, y, moments_of(x, wanted, draw(st.integers(1, 30))), rank


def moments_of(x: torch.Tensor, wanted: torch.Tensor, step: int) -> TargetMoments:
    own = Moments.empty(x.shape[1])
    targets = TargetMoments.empty(own, wanted.shape[1])
    for part, t in zip(x.split(step), wanted.split(step), strict=True):
        own.add(part)
        targets.add(part, t)
    return targets


def error_on(x, y, factors) -> float:
    """E|y − ŷ|² by computing ŷ for every token."""
    found = x @ factors.weight_in.t() @ factors.weight_out.t()
    return float((y - found - (0 if factors.bias is None else factors.bias)).square().sum(1).mean())


def size_of(y) -> float:
    return float(y.square().sum(1).mean()) + 1e-12


@given(problem=problems())
def test_the_error_is_known_before_anything_is_replaced(problem):
    weight, bias, x, y, targets, rank = problem
    factors = regress(weight, bias, targets, rank)
    on_tokens = error_on(x, y, factors)
    assert factors.predicted == pytest.approx(on_tokens, rel=1e-6, abs=1e-9 * size_of(y))
    measured = error_towards_targets(weight, bias, factors, targets)
    assert measured == pytest.approx(on_tokens, rel=1e-6, abs=1e-9 * size_of(y))
    assert variance_of_targets(weight, targets) == pytest.approx(
        float((y - y.mean(0)).square().sum(1).mean()), rel=1e-6, abs=1e-9 * size_of(y)
    )


@given(problem=problems())
def test_it_is_never_worse_than_mimic_and_than_the_dense_weights_with_all_ranks(problem):
    weight, bias, x, y, targets, rank = problem
    slack = 1e-8 * size_of(y)
    best = error_on(x, y, regress(weight, bias, targets, rank))
    assert best <= error_on(x, y, compress("mimic", weight, bias, targets.own, rank)) + slack
    whole = error_on(x, y, regress(weight, bias, targets, min(weight.shape)))
    assert whole <= error_towards_targets(weight, bias, None, targets) + slack


@given(problem=problems())
def test_no_map_of_the_rank_in_its_neighbourhood_is_better(problem):
    weight, bias, x, y, targets, rank = problem
    factors = regress(weight, bias, targets, rank, ridge=0.0)
    best, generator = error_on(x, y, factors), torch.Generator().manual_seed(rank)
    for _ in range(5):
        changed = [
            each + 1e-3 * each.abs().max() * torch.randn(each.shape, generator=generator, dtype=torch.float64)
            for each in (factors.weight_in, factors.weight_out, factors.bias)
        ]
        assert error_on(x, y, type(factors)(*changed, spectrum=factors.spectrum)) >= best - 1e-8 * size_of(y)


@given(problem=problems())
def test_where_nothing_is_missed_it_is_mimic_and_with_all_ranks_the_layer_itself(problem):
    weight, bias, x, _, _, rank = problem
    nothing = moments_of(x, x.new_zeros(len(x), len(weight)), 30)
    ours, mimic = regress(weight, bias, nothing, rank), compress("mimic", weight, bias, nothing.own, rank)
    torch.testing.assert_close(ours.weight_out @ ours.weight_in, mimic.weight_out @ mimic.weight_in)
    torch.testing.assert_close(ours.bias, mimic.bias)
    assert ours.predicted == pytest.approx(mimic.predicted, rel=1e-9, abs=1e-12)
    y = x @ weight.t() + (0 if bias is None else bias)
    assert error_on(x, y, regress(weight, bias, nothing, min(weight.shape))) <= 1e-10 * size_of(y)


def test_without_a_limit_of_rank_it_is_least_squares():
    """Against torch's own solver, with a column of ones for the bias."""
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(5, 7, generator=generator).double(), inputs("full", 90, 7, generator)
    wanted = torch.randn(90, 5, generator=generator).double()
    factors = regress(weight, None, moments_of(x, wanted, 20), 5, ridge=0.0)
    solved = torch.linalg.lstsq(torch.cat([x, torch.ones(90, 1)], 1), x @ weight.t() + wanted).solution
    torch.testing.assert_close(factors.weight_out @ factors.weight_in, solved[:-1].t(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(factors.bias, solved[-1], rtol=1e-8, atol=1e-8)


def test_it_is_ridge_regression_of_what_is_missed():
    """Against torch's own solver, each feature given a further row of its own that asks for nothing."""
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(5, 7, generator=generator).double(), inputs("full", 90, 7, generator)
    wanted = torch.randn(90, 5, generator=generator).double()
    factors = regress(weight, None, moments_of(x, wanted, 20), 5, ridge=0.2)
    centred = x - x.mean(0)
    size = (90 * 0.2 * centred.square().sum() / 90 / 7).sqrt()
    rows = torch.cat([centred, size * torch.eye(7, dtype=torch.float64)])
    solved = torch.linalg.lstsq(rows, torch.cat([wanted - wanted.mean(0), torch.zeros(7, 5)])).solution
    torch.testing.assert_close(factors.weight_out @ factors.weight_in, weight + solved.t(), rtol=1e-8, atol=1e-8)


def test_a_direction_in_which_little_varies_is_given_no_large_weights():
    """What a layer behind a compressed one is given; least squares makes weights a hundred times W's of it."""
    generator = torch.Generator().manual_seed(6)
    weight, x = torch.randn(6, 8, generator=generator).double(), inputs("full", 200, 8, generator)
    x[:, 0] *= 1e-3
    targets = moments_of(x, 0.3 * torch.randn(200, 6, generator=generator).double(), 50)

    def norm(**given: float) -> float:
        factors = regress(weight, None, targets, 6, **given)
        return float((factors.weight_out @ factors.weight_in).norm())

    assert norm(ridge=0.0) > 5 * float(weight.norm())
    assert norm() < 1.1 * float(weight.norm())
