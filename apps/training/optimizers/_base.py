"""What an optimizer is: typed defaults, the names of its state, and one pure update of one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Optimizer:
    """A per-tensor update rule, free of torch at import; nothing here holds tensors or counts steps.

    A file in this folder holds one subclass. `Config` (a frozen dataclass of numbers) gives its settings and their
    defaults. `update` is traced into the compiled step, so whatever may change from step to step or from run to run
    reaches it as a 0-d tensor in `hyper`; a Python number would be baked into the artifact silently.
    """

    Config: ClassVar[type]
    state_names: ClassVar[tuple[str, ...]] = ()  # one tensor each, shaped like the parameter, zero at the start
    hyperparameter_names: ClassVar[tuple[str, ...]] = ()  # the columns of the hyper-parameter tensor, in this order

    @staticmethod
    def hyperparameters(config: Any, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of one step for one parameter: `hyperparameter_names` → value.

        `step` is the number of the update, 1 for the first. `lr` is the schedule's rate of this step (not
        `config.lr`). `decayed` is false for norms and biases, which are exempt from weight decay.
        """
        raise NotImplementedError

    @staticmethod
    def update(
        parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New parameter and new state; pure, elementwise on shape [...], in the one dtype of its inputs.

        The caller upcasts to the dtype of the arithmetic (float32, or float64) and casts the results back.
        """
        raise NotImplementedError
