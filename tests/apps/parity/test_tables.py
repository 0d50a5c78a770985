"""The tables' cells: numbers a person can read, a dash where there is none."""

import math

import pytest

from apps.parity.energy import Energy
from apps.parity.tables import all_tables, costs, decibels, error_text, joules, layers, numbers
from apps.parity.timing import Timing
from tests.apps.parity.found import layer, variant

REFERENCE = variant("dense")
OTHER = variant(
    "own",
    layer("model.layers.0.mlp.up_proj", 0.1, input_gradient=0.01),
    layer("model.layers.1.mlp.up_proj", 0.2, input_gradient=0.03),
    layer("lm_head", 0.0, accumulated=0.7),
)


def test_a_row_a_backend() -> None:
    table = numbers(REFERENCE, [OTHER])
    assert table.rows[1] == ("dense (reference)", *["–"] * 8, "2.7183")
    assert dict(zip(table.rows[0], table.rows[2], strict=True)) == {
        "backend": "own",
        "layers": "3/3",
        "output": "0.1",
        "SNR dB": "20.0",
        "worst dB": "14.0",
        "d input": "0.02",
        "d weight": "–",
        "at head": "0.7",
        "KL": "0.5",
        "perplexity": "2.7183",
    }


def test_a_row_for_the_layers_of_all_blocks_under_a_short_name() -> None:
    rows = layers(OTHER).rows
    assert rows[1][:6] == (
        "model.layers.{0-1}.mlp.up_proj",
        "Own",
        "0.15",
        "0.2",
        "14.0",
        "1",
    )
    assert rows[2][:6] == ("lm_head", "Own", "0", "0", "∞", "")


def test_costs_say_what_was_not_measured() -> None:
    measured = variant("own", timing=Timing(0.5, 2.0, 3 * 2**30, 1.0), energy=Energy(2.5e-6, 0.875))
    assert costs([REFERENCE, measured]).rows[1:] == [
        ("dense", "250 ms", "1.5 s", "1.25", "–", "–", "–"),
        ("own", "500 ms", "2 s", "1.00", "3.0 GiB", "2.5 µJ", "88%"),
    ]


def test_numbers_stand_under_one_another() -> None:
    lines = numbers(REFERENCE, [OTHER]).text().splitlines()[1:]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(all_tables(REFERENCE, [OTHER, OTHER])) == 4


def test_each_constant_of_the_energy_is_told_once() -> None:
    stands_on = [("mac", "2 fJ", "assumption: made up")]
    table = all_tables(REFERENCE, [variant("a", layer("b"), constants=stands_on)] * 2)[2]
    assert table.rows[1:] == stands_on
    assert table.text().endswith("mac       2 fJ   assumption: made up")


@pytest.mark.parametrize(
    ("relative", "text", "snr"),
    [
        (0.0, "0", "∞"),
        (0.01234, "0.0123", "38.2"),
        (1.5e-5, "1.50e-05", "96.5"),
        (2.0, "2", "-6.0"),
        (math.inf, "∞", "-∞"),
        (math.nan, "–", "–"),
    ],
)
def test_errors(relative: float, text: str, snr: str) -> None:
    assert (error_text(relative), decibels(relative)) == (text, snr)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (2.0, "2 J"), (3.1e-3, "3.1 mJ"), (4.56e-8, "45.6 nJ"), (7e-12, "7 pJ")]
)
def test_energies(value: float | None, text: str) -> None:
    assert joules(value) == text
