"""That somebody hears how far the passes before the first layer are."""

from typing import Any

import pytest

from modelzoo.compression import compress_model
from tests.modelzoo.compression.test_sensitivity import batches, pair

GRADIENTS = [("gradients", "batches", done, 3) for done in range(4)]


def spectra(total: int) -> list[tuple[str, str, int, int]]:
    return [("spectra", "blocks", done, total) for done in range(total + 1)]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({}, []),
        ({"weighting": "gradient"}, ["gradients"]),
        ({"allocation": "spectrum"}, ["spectra"]),
        ({"weighting": "gradient", "allocation": "spectrum"}, ["gradients", "spectra"]),
    ],
    ids=str,
)
def test_each_pass_tells_how_far_it_is(choice: dict[str, Any], names: list[str]) -> None:
    heard: list[tuple[str, str, int, int]] = []
    model = pair()[1]
    compress_model(
        model,
        batches(3),
        keep=0.5,
        on_pass=lambda *told: heard.append(told),
        on_layer=lambda report: heard.append(("layer", "", 0, 0)),
        **choice,
    )
    before = heard[: heard.index(("layer", "", 0, 0))]
    assert heard.count(("layer", "", 0, 0)) == len(heard) - len(before)
    expected = {"gradients": GRADIENTS, "spectra": spectra(model.config.num_hidden_layers)}
    assert before == [each for name in names for each in expected[name]]
