"""Ranks from a budget: never over it, and for small problems against trying everything."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.errors import UserError
from modelzoo.compression.allocation import LayerShape, given_ranks, spectrum_ranks, uniform_ranks


def numbers(shapes, ranks):
    return sum(shape.dense if ranks[name] is None else ranks[name] * shape.per_rank for name, shape in shapes.items())


def relative(spectra):
    """Costs that count an error relative to all that the layer's outputs vary."""
    return {name: 1 / max(float(spectrum.sum()), 1e-30) for name, spectrum in spectra.items()}


@st.composite
def layers(draw: st.DrawFn):
    shapes, spectra = {}, {}
    for index in range(draw(st.integers(1, 5))):
        shape = LayerShape(draw(st.integers(4, 30)), draw(st.integers(4, 30)))
        values = draw(st.lists(st.floats(0, 100), min_size=1, max_size=min(shape.in_features, shape.out_features)))
        shapes[f"layer.{index}"] = shape
        spectra[f"layer.{index}"] = torch.tensor(values, dtype=torch.float64).sort(descending=True).values
    return shapes, spectra


@given(problem=layers(), keep=st.floats(0.05, 1))
def test_no_allocation_spends_more_than_the_budget_or_less_than_a_rank_each(problem, keep):
    shapes, spectra = problem
    budget = keep * sum(shape.dense for shape in shapes.values())
    least = sum(shape.per_rank for shape in shapes.values())
    costs = dict(zip(shapes, (0.0, 1.0, 1e-3, 50.0, 1e-300), strict=False))
    for ranks in (
        uniform_ranks(shapes, keep),
        *(spectrum_ranks(shapes, spectra, each, keep) for each in (relative(spectra), costs)),
    ):
        assert numbers(shapes, ranks) <= max(budget, least)
        for name, rank in ranks.items():
            assert rank is None or 1 <= rank <= max(1, shapes[name].most)


def test_the_spectrum_decides_as_trying_everything_does():
    shapes = {"a": LayerShape(12, 12), "b": LayerShape(12, 12), "c": LayerShape(12, 12)}
    spectra = {
        "a": torch.tensor([9.0, 3.0, 1.0, 0.5, 0.1], dtype=torch.float64),
        "b": torch.tensor([5.0, 5.0, 5.0, 5.0, 5.0], dtype=torch.float64),
        "c": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64),
    }
    for keep, costs in itertools.product((0.2, 0.3, 0.4, 0.45), (relative(spectra), {"a": 0.1, "b": 0.5, "c": 20.0})):
        budget = int(keep * 3 * 144)

        def error(ranks, costs=costs):
            return sum(costs[name] * float(spectra[name][rank:].sum()) for name, rank in ranks.items())

        every = (dict(zip(shapes, ranks, strict=True)) for ranks in itertools.product(range(1, 6), repeat=3))
        best = min(error(ranks) for ranks in every if 24 * sum(ranks.values()) <= budget)
        found = spectrum_ranks(shapes, spectra, costs, keep)
        assert error(found) == pytest.approx(best)


def test_large_ranks_are_such_as_a_gpu_reads_well():
    shapes = {"wide": LayerShape(2048, 5632), "narrow": LayerShape(100, 100)}
    spectra = {"wide": torch.linspace(2, 1, 2048).double(), "narrow": torch.linspace(2, 1, 100).double()}
    for keep in (0.3, 0.5, 0.7, 0.85):
        for ranks in (uniform_ranks(shapes, keep), spectrum_ranks(shapes, spectra, relative(spectra), keep)):
            assert ranks["wide"] % 8 == 0
            assert numbers(shapes, ranks) <= keep * sum(shape.dense for shape in shapes.values())
    assert uniform_ranks(shapes, 0.5) == {"wide": 744, "narrow": 25}  # of 750


def test_steps_of_eight_are_taken_where_they_remove_most():
    shapes = {"a": LayerShape(400, 400), "b": LayerShape(400, 400)}
    spectra = {
        "a": torch.cat([torch.full((64,), 9.0), torch.full((8,), 0.5), torch.zeros(328)]).double(),
        "b": torch.cat([torch.full((64,), 9.0), torch.full((8,), 1.0), torch.zeros(328)]).double(),
    }
    keep = (2 * 64 + 12) * 800 / (2 * 160000)  # twelve more than 64 each: one step
    found = spectrum_ranks(shapes, spectra, relative(spectra), keep)
    assert found == {"a": 64, "b": 72}


def test_a_layer_that_needs_all_its_ranks_stays_dense_if_the_budget_pays_for_it():
    shapes = {"flat": LayerShape(10, 10), "steep": LayerShape(10, 10)}
    spectra = {
        "flat": torch.ones(10, dtype=torch.float64),
        "steep": torch.tensor([100.0] + [1e-9] * 9, dtype=torch.float64),
    }
    assert spectrum_ranks(shapes, spectra, relative(spectra), 0.65) == {"flat": None, "steep": 1}
    assert given_ranks(shapes, {"flat": 4, "steep": 5}) == {"flat": 4, "steep": None}
    assert uniform_ranks(shapes, 1.0) == {"flat": None, "steep": None}


def test_a_layer_of_one_output_stays_dense():
    """Rank 1 takes 17 numbers where the matrix has 16; what the matrix takes is no longer there for the others."""
    shapes = {"gate": LayerShape(16, 1), "wide": LayerShape(16, 16)}
    spectra = {"gate": torch.ones(1, dtype=torch.float64), "wide": torch.linspace(2, 1, 16).double()}
    assert uniform_ranks(shapes, 0.5) == {"gate": None, "wide": 4}
    assert spectrum_ranks(shapes, spectra, relative(spectra), 0.5) == {"gate": None, "wide": 3}  # (136 − 16) / 32
    assert spectrum_ranks(shapes, spectra, relative(spectra), 0.01) == {"gate": None, "wide": 1}


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.01, float("nan")])
def test_only_a_share_is_a_share(keep):
    with pytest.raises(UserError, match="Expected the share"):
        uniform_ranks({"a": LayerShape(4, 4)}, keep)
