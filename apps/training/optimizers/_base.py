"""What an optimizer is: typed defaults, the names of its state, and one pure update of a tensor, or of several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
# What a parameter is for: a tied head is an embedding, a norm's or a bias's numbers are a vector.
Role = Literal["embedding", "head", "matrix", "vector"]


class Optimizer:
    """An update rule, free of torch at import; nothing here holds tensors or counts steps.

    A file in this folder holds one public subclass. `Config` (a frozen dataclass of numbers) gives its settings and
    their defaults. `update` is traced into the compiled step, so whatever may change from step to step or from run to
    run reaches it as a 0-d tensor in `hyper`; a Python number would be baked into the artifact silently. Settings that
    do change the graph (how often a loop runs) are named in `structure`, belong to the artifact, and lie in `fixed`.

    The workers of a job share whole tensors out among them, never slices: an update may look at all of its tensor.
    """

    Config: ClassVar[type]
    label: ClassVar[str] = ""  # what a table calls it, where one optimizer has several parts
    state_names: ClassVar[tuple[str, ...]] = ()  # one tensor each, zero at the start
    hyperparameter_names: ClassVar[tuple[str, ...]] = ()  # the columns of the hyper-parameter tensor, in this order
    structure: ClassVar[tuple[str, ...]] = ()  # the fields of Config that change the graph

    def __init__(self, **fixed: Any) -> None:
        """`fixed`: the values of `structure`; what is not given is as Config has it."""
        self.fixed = {name: fixed.get(name, self._default(name)) for name in self.structure}

    def _default(self, name: str) -> Any:
        return getattr(getattr(self, "Config", None), name, None)

    @property
    def key(self) -> str:
        """Equal for two that trace to the same graph."""
        own = type(self)
        return f"{own.__module__}:{own.__qualname__}" + (f" {self.fixed}" if self.fixed else "")

    @classmethod
    def part(cls, name: str, shape: Shape, role: Role) -> type[Optimizer]:
        """The class that updates the parameter `name`; another one where an optimizer treats kinds of them apart."""
        return cls

    @classmethod
    def state_shapes(cls, shape: Shape) -> dict[str, Shape]:
        """State → shape, for a parameter of `shape`. Some of `state_names` may be missing."""
        return dict.fromkeys(cls.state_names, shape)

    @staticmethod
    def hyperparameters(config: Any, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of one step for one parameter: `hyperparameter_names` → value.

        `step` is the number of the update, 1 for the first. `lr` is the schedule's rate of this step (not
        `config.lr`). `decayed` is false for norms and biases, which are exempt from weight decay.
        """
        raise NotImplementedError

    @property
    def total_names(self) -> tuple[str, ...]:
        """Sums over all parameters of the rule, in every block, that an update needs first: more names in `hyper`."""
        return ()

    def totals(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One parameter's share of the sums, 0-d each; `total_names` → value."""
        raise NotImplementedError

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New parameter and new state of one tensor; pure, in the one dtype of its inputs.

        The caller upcasts to the dtype of the arithmetic (float32, or float64) and casts the results back.
        """
        raise NotImplementedError

    def update_group(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        hypers: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """`update` of all tensors that this rule updates together (those of a block), by name.

        To be overridden by a rule that gains from having them at once: equal shapes as one batch.
        """
        return {name: self.update(parameters[name], gradients[name], states[name], hypers[name]) for name in parameters}
