"""Moments of inputs: the principal directions are those of all tokens counted so far, and found once for all layers."""

import pytest
import torch

from modelzoo.compression import moments as module
from modelzoo.compression.methods import compress
from modelzoo.compression.moments import Moments, TargetMoments
from modelzoo.compression.regression import regress


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


def test_the_principal_directions_are_of_the_tokens_counted_so_far(x: torch.Tensor) -> None:
    moments = Moments.empty(5)
    moments.add(x[:20])
    moments.principal()
    moments.add(x[20:])
    values, basis = moments.principal()
    torch.testing.assert_close((basis * values) @ basis.t(), x.t().cov(correction=0))
    assert list(values) == sorted(values, reverse=True)


def test_layers_of_one_input_share_them(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = module.eigh
    monkeypatch.setattr(module, "eigh", lambda matrix: sizes.append(len(matrix)) or plain(matrix))
    moments = Moments.empty(5)
    moments.add(x)
    for out_features in (7, 8):
        weight = torch.randn(out_features, 5, dtype=torch.float64)
        compress("mimic", weight, None, moments, 2)
        regress(weight, None, TargetMoments.empty(moments, out_features), 2)
    assert sizes == [5]
