"""Errors that count by the loss's gradients: against the SVD that they come to, token by token, and against mimic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modelzoo.compression.methods import Factors, compress
from modelzoo.compression.regression import regress
from modelzoo.compression.sensitivity import Sensitivity
from modelzoo.compression.weighted import weighted_projection, weighted_spectrum
from tests.modelzoo.compression.test_methods import KINDS, inputs
from tests.modelzoo.compression.test_regression import error_on, moments_of, size_of


def sensitivity_of(weight: Tensor, gradients: Tensor, of_inputs: bool | None = None) -> Sensitivity:
    """From gradients [tokens, out]; `of_inputs`: in that form, None: in the one that is smaller."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, dtype=torch.float64)
    layer.weight = nn.Parameter(weight)
    found = Sensitivity.empty(layer)
    if of_inputs is not None:
        features = in_features if of_inputs else out_features
        found = Sensitivity(found.second.new_zeros(features, features), found.squared, of_inputs)
    for part in gradients.split(7):
        found.add(layer, part)
    return found


def what_counts(gradients: Tensor) -> Tensor:
    """Σggᵀ with its damping, as the formulas have it."""
    second = gradients.t() @ gradients
    mean = second.trace() / len(second)
    return second + (0.1 * mean if mean > 0 else 1.0) * torch.eye(len(second), dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn):
    """Weight, inputs x, what is wanted beyond W x, its moments, gradients, and a rank."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    in_features, out_features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    x = inputs(draw(st.sampled_from(KINDS)), draw(st.integers(1, 60)), in_features, generator)
    change = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    wanted = draw(st.sampled_from([0.0, 0.1])) * x @ change @ weight.t()
    gradients = torch.randn(draw(st.integers(1, 20)), out_features, generator=generator, dtype=torch.float64)
    gradients *= draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
    gradients[:, 0] *= 10
    return weight, x, wanted, moments_of(x, wanted, 13), gradients, draw(st.integers(1, min(weight.shape)))


def weighted_error_on(x: Tensor, y: Tensor, factors: Factors, counts: Tensor) -> float:
    """E[eᵀ G e] by computing ŷ for every token."""
    assert factors.bias is not None
    error = y - x @ factors.weight_in.t() @ factors.weight_out.t() - factors.bias
    return float(((error @ counts) * error).sum(1).mean())


@given(problem=problems())
def test_no_map_of_the_rank_is_better_where_errors_count_so(problem):
    """Eckart and Young for R C F, by an SVD of that matrix itself."""
    weight, x, _, _, gradients, rank = problem
    nothing_more = moments_of(x, torch.zeros(len(x), len(weight), dtype=torch.float64), 13)
    factors = regress(weight, None, nothing_more, rank, sensitivity=sensitivity_of(weight, gradients))
    counts, y = what_counts(gradients), x @ weight.t()
    values, basis = torch.linalg.eigh(counts)
    centred = (x - x.mean(0)) / len(x) ** 0.5
    singular = torch.linalg.svdvals((basis * values.sqrt()).t() @ weight @ centred.t())
    least = float(singular[rank:].square().sum())
    size = float(singular.square().sum()) + 1e-12 * float(values.max()) * size_of(y)
    assert weighted_error_on(x, y, factors, counts) == pytest.approx(least, rel=1e-6, abs=1e-9 * size)
    spectrum = weighted_spectrum(weight, nothing_more.own, sensitivity_of(weight, gradients))
    assert float(spectrum[rank:].sum()) == pytest.approx(least, rel=1e-6, abs=1e-9 * size)
    mimic = compress("mimic", weight, None, nothing_more.own, rank)
    assert least <= weighted_error_on(x, y, mimic, counts) * (1 + 1e-9) + 1e-9 * size


@given(problem=problems())
def test_the_plain_error_is_known_beforehand(problem):
    weight, x, wanted, targets, gradients, rank = problem
    factors = regress(weight, None, targets, rank, sensitivity=sensitivity_of(weight, gradients))
    y = x @ weight.t() + wanted
    assert factors.predicted == pytest.approx(error_on(x, y, factors), rel=1e-6, abs=1e-8 * size_of(y))


@given(problem=problems())
def test_both_forms_of_a_sensitivity_tell_the_same(problem):
    """What is wanted lies in the range of W, as for layers that read the stream."""
    weight, x, _, targets, gradients, rank = problem
    own, best = targets.own, weight + 0.1 * weight @ torch.ones(weight.shape[1], weight.shape[1]).double()
    maps, spectra = [], []
    for of_inputs in (False, True):
        sensitivity = sensitivity_of(weight, gradients, of_inputs)
        weight_in, weight_out, spectrum = weighted_projection(weight, best, own, sensitivity, rank)
        maps.append(x @ weight_in.t() @ weight_out.t())
        spectra.append(spectrum[: min(weight.shape)])
    counted = float(what_counts(gradients).trace() * best.square().sum() * targets.own.uncentred.trace())
    size = float(spectra[0][:1].sum()) + 1e-9 * counted + 1e-300
    torch.testing.assert_close(spectra[0] / size, spectra[1] / size, rtol=1e-6, atol=1e-7)
    is_parted = rank < len(spectra[0]) and spectra[0][rank - 1] - spectra[0][rank] > 1e-3 * size
    if is_parted:  # else several maps are as good
        scale = float(maps[0].abs().max())
        torch.testing.assert_close(maps[0] / scale, maps[1] / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_without_a_gradient_all_outputs_count_alike(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(50, shape[1], generator=generator, dtype=torch.float64) + 1
    targets = moments_of(x, x.new_zeros(50, shape[0]), 50)
    silent = sensitivity_of(weight, torch.zeros(4, shape[0], dtype=torch.float64))
    found = regress(weight, None, targets, 3, sensitivity=silent)
    expected = compress("mimic", weight, None, targets.own, 3)
    torch.testing.assert_close(found.weight_out @ found.weight_in, expected.weight_out @ expected.weight_in)
    torch.testing.assert_close(found.bias, expected.bias)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_with_all_ranks_the_layer_is_what_it_was(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
    targets = moments_of(x, x.new_zeros(50, shape[0]), 50)
    sensitivity = sensitivity_of(weight, torch.randn(20, shape[0], generator=generator, dtype=torch.float64))
    factors = regress(weight, None, targets, min(shape), sensitivity=sensitivity)
    torch.testing.assert_close(factors.weight_out @ factors.weight_in, weight)
