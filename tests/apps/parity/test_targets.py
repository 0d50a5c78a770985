"""A step of known settings, planned for each target."""

from pathlib import Path

from apps.parity.entries import read_entries
from apps.parity.target_entries import read_targets
from apps.parity.targets import artifact_of, plan_targets
from tests.apps.parity.known_errors import settings_for


def test_only_the_section_compile_differs(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_for(tiny_dataset, tiny_model, output_dir=str(tmp_path), seed=7, device="cpu")
    (entry,) = read_entries([{"rules": [{"match": "*.mlp.*", "use": "optical"}]}], at_least=1)
    tosa = {"target": "mlir", "mlir.dialect": "tosa", "head_chunks": 3}  # no compiler is asked for its version
    planned = plan_targets(read_targets(["eager", "inductor", tosa]), entry, settings)
    first, second, third = (each.plan.spec for each in planned)
    assert first.to_json() == second.to_json()
    assert third.target == {"kind": "mlir", "dialect": "tosa"}
    assert third.head_chunks == 3
    assert first.routing == third.routing
    assert len(first.routing) == 2
    assert (first.batch_size, first.max_seq_length) == (3, 32)
    assert [each.config.training.seed for each in planned] == [7, 7, 7]
    assert artifact_of(planned[0]) is None
    assert not list(tmp_path.iterdir())
