"""parity.png is a picture with something on it; what is drawn is what can be drawn."""

import math
from pathlib import Path

import matplotlib.image

from apps.parity.plot import by_block, write_plot
from tests.apps.parity.found import layer, variant


def blocks(scale: float) -> list:
    return [layer(f"layers.{block}.{name}", scale * 2.0**-block) for block in range(4) for name in ("up", "down")]


def test_the_picture_shows_a_line_for_each_backend(tmp_path: Path) -> None:
    write_plot(tmp_path / "one.png", [variant("a", *blocks(0.5))], title="demo")
    write_plot(tmp_path / "two.png", [variant("a", *blocks(0.5)), variant("b", *blocks(0.1))], title="demo")
    one, two = (matplotlib.image.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.shape[0] > 300
    assert (one.std(axis=-1) > 0.05).sum() < (two.std(axis=-1) > 0.05).sum()  # pixels with a colour
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_picture_without_any_error_says_so(tmp_path: Path) -> None:
    write_plot(tmp_path / "parity.png", [variant("a", layer("lm_head", 0.0, accumulated=0.0))], title="demo")
    assert matplotlib.image.imread(tmp_path / "parity.png").std() > 0


def test_only_what_a_logarithm_knows_is_drawn() -> None:
    layers = [layer("a.0", 0.5), layer("b.0", 0.0), layer("a.1", math.inf), layer("a.2", math.nan), layer("head", None)]
    assert by_block(variant("v", *layers), "output") == {0: [0.5]}
