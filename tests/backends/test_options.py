import dataclasses
from typing import Literal

import pytest

from backends.errors import UserError
from backends.options import build_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rank: int
    smooth: float = 0.9
    bypass: bool = False
    mode: Literal["random", "deterministic"] = "random"
    quantiles: tuple[float, float] | None = None
    bits: tuple[int, ...] = ()


def build(**options):
    return build_config(Config, options, "lab")


def test_values_arrive_as_the_fields_type():
    config = build(rank=4, smooth=1, quantiles=[0, 0.5], bits=[4, 8, 10])
    assert config == Config(rank=4, smooth=1.0, quantiles=(0.0, 0.5), bits=(4, 8, 10))
    assert isinstance(config.smooth, float)


def test_none_where_none_is_allowed():
    assert build(rank=4, quantiles=None).quantiles is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "4"}, "Option 'rank' of backend 'lab' is '4' (str). Expected int."),
        ({"rank": True}, "Option 'rank' of backend 'lab' is True (bool). Expected int."),
        ({"rank": 4.0}, "Option 'rank' of backend 'lab' is 4.0 (float). Expected int."),
        ({"rank": 4, "bypass": 1}, "Option 'bypass' of backend 'lab' is 1 (int). Expected bool."),
        ({"rank": 4, "smooth": None}, "Option 'smooth' of backend 'lab' is None (NoneType). Expected float."),
        (
            {"rank": 4, "mode": "rand"},
            "Option 'mode' of backend 'lab' is 'rand' (str). Expected one of 'random', 'deterministic'.",
        ),
        (
            {"rank": 4, "quantiles": [0.1]},
            "Option 'quantiles' of backend 'lab' is [0.1] (list). Expected tuple[float, float] | None.",
        ),
        (
            {"rnak": 4},
            "Unknown lab option 'rnak'. Did you mean 'rank'? Available: rank, smooth, bypass, mode, quantiles, bits.",
        ),
        ({}, "Backend 'lab' needs the option 'rank' (int)."),
    ],
)
def test_each_mistake_is_one_clear_line(options, message):
    with pytest.raises(UserError) as error:
        build(**options)
    assert str(error.value) == message
