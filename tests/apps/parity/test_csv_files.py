"""The CSV files read back."""

import csv
import math
from pathlib import Path

from apps.parity.csv_files import write_layers, write_summary
from apps.parity.energy import Energy
from tests.apps.parity.found import layer, variant


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_layer_of_every_backend_has_a_row(tmp_path: Path) -> None:
    others = [
        variant("a, b", layer("model.layers.0.mlp.up_proj", 0.1, input_gradient=0.0), layer("lm_head", math.nan)),
        variant("c", layer("model.layers.0.mlp.up_proj", 0.3)),
    ]
    write_layers(tmp_path / "new" / "parity.csv", others)
    rows = read(tmp_path / "new" / "parity.csv")
    assert [(row["backend"], row["layer"], row["block"]) for row in rows] == [
        ("a, b", "model.layers.0.mlp.up_proj", "0"),
        ("a, b", "lm_head", "1"),
        ("c", "model.layers.0.mlp.up_proj", "0"),
    ]
    assert math.isclose(float(rows[0]["output_error"]), 0.1)
    assert math.isclose(float(rows[0]["output_snr_db"]), 20.0)
    assert (rows[0]["input_gradient_error"], rows[0]["input_gradient_snr_db"]) == ("0.0", "inf")
    assert (rows[0]["weight_gradient_error"], rows[0]["weight_gradient_snr_db"]) == ("", "")
    assert rows[1]["output_error"] == rows[1]["output_snr_db"] == "nan"
    assert rows[0]["computed_by"] == "a.b:Own(levels=4)"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["parity.csv"]


def test_every_backend_has_a_row_in_the_summary(tmp_path: Path) -> None:
    write_summary(tmp_path / "s.csv", [variant("dense"), variant("own", layer("lm_head"), energy=Energy(2.5e-6, 0.5))])
    first, second = read(tmp_path / "s.csv")
    assert (first["backend"], first["kl_nats_per_token"], first["joules_per_token"]) == ("dense", "0.0", "")
    assert (second["kl_nats_per_token"], second["joules_per_token"], second["step_seconds"]) == (
        "0.5",
        "2.5e-06",
        "1.5",
    )
    assert math.isclose(float(second["perplexity"]), math.e)
