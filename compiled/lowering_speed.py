"""Two things that Inductor does for every operator of every kernel, and need not: up to two fifths of its time.

The code it makes is the same to the letter. Touches torch's private compiler interfaces, like `lowering`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_repetition() -> Iterator[None]:
    """Inductor is faster inside."""
    with rules_made_once(), equal_ranges_kept():
        yield


@contextlib.contextmanager
def rules_made_once() -> Iterator[None]:
    """The handler of dtypes is one object, but Python calls `__init__` at each use of the class, which fills in the
    rules of all operators again."""
    from torch._inductor import lowering, utils  # noqa: F401  (importing the lowerings gives the rules)
    from torch._inductor.codegen.common import pointwise_overrides_data
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler

    fill = DtypePropagationOpsHandler.__init__
    filled: tuple[int, int] | None = None

    def fill_once(handler: DtypePropagationOpsHandler) -> None:
        nonlocal filled
        rules = len(utils.op_dtype_propagation_rules), len(pointwise_overrides_data)
        if rules != filled:
            fill(handler)
            filled = rules

    with _replaced(DtypePropagationOpsHandler, "__init__", fill_once):
        yield


@contextlib.contextmanager
def equal_ranges_kept() -> Iterator[None]:
    """What a value is known to lie between is met with itself when it gets its name, by comparing sympy's numbers."""
    from torch.utils._sympy.value_ranges import ValueRanges

    intersect = ValueRanges.__and__

    def meet(one: Any, other: Any) -> Any:
        same = one.lower is other.lower and one.upper is other.upper and type(one) is type(other)
        return one if same else intersect(one, other)

    with _replaced(ValueRanges, "__and__", meet):
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str, method: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, before)
