"""That somebody hears how far the passes before the first layer are, and how many layers are compressed."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from modelzoo.compression import compress_model
from tests.modelzoo.compression.test_sensitivity import batches, pair

GRADIENTS = [("taking gradients", "batches", done, 3) for done in range(4)]


def spectra(total: int) -> list[tuple[str, str, int, int]]:
    return [("taking spectra", "blocks", done, total) for done in range(total + 1)]


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
    total = len(list(linears(model)))
    layers = [("compressing", "layers", done, total) for done in range(1, total + 1)]
    first = heard.index(("compressing", "layers", 0, total))
    assert heard[first + 1 :] == [told for each in layers for told in (("layer", "", 0, 0), each)]
    expected = {"gradients": GRADIENTS, "spectra": spectra(model.config.num_hidden_layers)}
    assert heard[:first] == [each for name in names for each in expected[name]]


def linears(model: nn.Module) -> Iterator[str]:
    return (name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".layers." in name)
