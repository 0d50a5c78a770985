"""What is labelled when a program or a reducer is."""

from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from apps.profiling.names import COLLECTIVES
from apps.profiling.recording import LabelledReducer
from compiled.reduction import Gradients, OneWorker


class Noisy(OneWorker):
    """Says what it does where a trace shows it."""

    is_alone = False

    def finished(self, *, everything: bool, pairs: bool = False) -> Iterator[tuple[int, Gradients]]:
        for each in super().finished(everything=everything, pairs=pairs):
            with record_function("waiting"):
                yield_this = each
            yield yield_this


def test_a_reducer_is_labelled_while_it_works_and_not_while_others_use_what_it_gave() -> None:
    reducer = LabelledReducer(Noisy())
    gradients = [{"a": torch.ones(2)}, {"b": torch.zeros(2)}]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for group, each in enumerate(gradients):
            reducer.start(group, each)
        found = []
        for group, each in reducer.finished(everything=True):
            with record_function("update"):
                found.append((group, each))
    assert found == list(enumerate(gradients))
    assert not reducer.is_alone
    assert reducer.owns(0)
    spans: dict[str, list[tuple[int, int]]] = {}
    for event in profiler.events():
        spans.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    labels = spans[COLLECTIVES]
    assert len(labels) == 2 + 3  # each start, each group, and the question that finds none left

    def is_inside(span: tuple[int, int]) -> bool:
        return any(begin <= span[0] and span[1] <= end for begin, end in labels)

    assert len(spans["waiting"]) == len(spans["update"]) == 2
    assert all(is_inside(span) for span in spans["waiting"])
    assert not any(is_inside(span) for span in spans["update"])
