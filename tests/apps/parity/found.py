"""Results made up by hand, for tests of what is written about them."""

from __future__ import annotations

from typing import Any

from apps.parity.energy import Energy
from apps.parity.powers import Error
from apps.parity.results import LayerResult, VariantResult
from apps.parity.timing import Timing
from apps.training.reporting.records import Evaluation


def layer(name: str, output: float | None = 0.1, **changes: Any) -> LayerResult:
    """A layer whose errors are these relative ones; by default only those of the output, and twice that in the end."""
    relative = {"output": output, "input_gradient": None, "weight_gradient": None, "accumulated": 0.2, **changes}
    errors = {key: None if value is None else Error(1.0, value**2) for key, value in relative.items()}
    kind: Any = "attention" if name.endswith("attn") else "linear"
    return LayerResult(name, kind, "a.b:Own(levels=4)", True, **errors)


def variant(name: str, *layers: LayerResult, **changes: Any) -> VariantResult:
    """A variant with two dev tokens of loss 1 nat."""
    given: dict[str, Any] = {
        "routed_table": f"the table of {name}",
        "evaluation": Evaluation(0, 1.0, 2),
        "kl": 0.5 if layers else None,
        "timing": Timing(forward=0.25, step=1.5, memory=None, ratio=1.25),
        "energy": Energy(None, 0.0),
        "layers": list(layers),
    }
    return VariantResult(name=name, **(given | changes))
