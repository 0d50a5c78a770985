"""What `targets=[…]` may say."""

import pytest

from apps.parity.target_entries import read_targets
from backends.errors import UserError


def test_names_and_settings() -> None:
    other = {"target": "mlir", "mlir.dialect": "stablehlo"}
    targets = read_targets(["eager", "mlir", other, "mlir", {"target": "inductor", "name": "i"}])
    assert [target.name for target in targets] == ["eager", "mlir", "mlir(mlir.dialect=stablehlo)", "mlir #2", "i"]
    assert targets[2].arguments == ["compile.target=mlir", "compile.mlir.dialect=stablehlo"]
    assert targets[4].arguments == ["compile.target=inductor"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["eager"], "targets has 1 entry. Expected two at least"),
        (["eager", "mlri"], "Did you mean 'mlir'?"),
        (["eager", {"mlir.dialect": "torch"}], "targets[1] is {'mlir.dialect': 'torch'}. Expected one of inductor"),
        ([3, "eager"], "targets[0] is 3. Expected one of"),
    ],
)
def test_other_forms_are_refused(given: list[object], told: str) -> None:
    with pytest.raises(UserError) as refused:
        read_targets(given)
    assert told in str(refused.value)
