"""What a step asks of the other workers: gradients summed while the sweep goes on, and who updates which group.

The step knows no process group; `OneWorker` is how it runs alone, and the trainer gives it another reducer otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

Gradients = dict[str, Tensor]  # by the model's parameter name; one that is still a sum of two has both, see `addend`


def addend(name: str) -> str:
    """Under what name the other worker's gradient of parameter `name` stands, where the update shall add the two."""
    return f"+{name}"


class Reducer(Protocol):
    """Groups go in as their gradients become final and come out summed over all workers, in the same order."""

    is_alone: bool  # there are no other workers
    widens: bool  # gradients come out in at least float32, whatever they went in as
    shards: bool  # each group is summed for, and updated by, its owner alone

    def assign(self, group_bytes: Sequence[int]) -> None:
        """Told once how large the groups are, before anything else."""

    def owns(self, group: int) -> bool:
        """Whether this worker keeps the group's optimizer state and updates it."""

    def expect_rows(self, group: int, rows: Sequence[Tensor], num_rows: int) -> None:
        """Told early in a step: the gradients of a group, [`num_rows`, …] each, are zero here outside these rows.

        `rows`: integers of any shape, repeated or not. Holds for the group's next `start`.
        """

    def start(self, group: int, gradients: Gradients) -> None:
        """Begin to sum; the tensors, and the dict, belong to the reducer from here on."""

    def finished(self, *, everything: bool, pairs: bool = False) -> Iterator[tuple[int, Gradients]]:
        """Groups summed so far (no gradients for one that another worker owns); with `everything`, waits for the rest.

        `pairs`: a group of which two workers have a part may come as both, in the dtype in which it was started, and
        only until the next one is asked for. Every worker has to ask at the same points of its step.
        """

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the workers, in place."""

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of the workers' tensors, elementwise, in place."""

    def publish(self, group: int, parameters: Mapping[str, Tensor]) -> None:
        """Called for every group after its update: with sharding, the owner's parameters replace everybody's."""

    def settle(self) -> None:
        """Wait until all that was published has arrived."""


class OneWorker:
    """A job of one: gradients are their own sums."""

    is_alone, widens, shards = True, False, False

    def __init__(self) -> None:
        self._summed: list[tuple[int, Gradients]] = []

    def assign(self, group_bytes: Sequence[int]) -> None:
        pass

    def owns(self, group: int) -> bool:
        return True

    def expect_rows(self, group: int, rows: Sequence[Tensor], num_rows: int) -> None:
        pass

    def start(self, group: int, gradients: Gradients) -> None:
        self._summed.append((group, gradients))

    def finished(self, *, everything: bool, pairs: bool = False) -> Iterator[tuple[int, Gradients]]:
        while self._summed:
            yield self._summed.pop(0)

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        return tensor

    def publish(self, group: int, parameters: Mapping[str, Tensor]) -> None:
        pass

    def settle(self) -> None:
        pass
