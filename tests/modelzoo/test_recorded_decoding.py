"""A token's forward as a recording: the numbers of the model's own, computed anew where it cannot stand for a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.generation import CompileConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from modelzoo import recorded_decoding
from modelzoo.llama import ZooLlamaForCausalLM
from modelzoo.recorded_decoding import RecordedDecoding
from tests.modelzoo.llamas import ROPES, llama_config, twins

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Replays:
    """CUDA graphs on a CPU: a recording computes its forward again at each replay, from the tensors it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.replayed = 0
        self.devices: list[torch.device] = []  # those current, the last one innermost
        replays = self

        class Graph:
            def replay(self) -> None:
                assert replays.devices == [torch.device("cpu")]
                replays.replayed += 1

        class Recording:
            def __init__(self, graph: Graph, stream: torch.device) -> None:
                assert stream == torch.device("cpu")
                replays.recorded += 1

            def __enter__(self) -> None: ...

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "device", self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)

    @contextmanager
    def current(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield
        self.devices.pop()


class Counting(nn.Module):
    """Logits that say how often the forward ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, input_ids: Tensor, **given: Any) -> CausalLMOutputWithPast:
        self.calls += 1
        return CausalLMOutputWithPast(
            loss=None if given.get("labels") is None else torch.tensor(1.0),
            logits=input_ids[..., None] * 2.0,
            past_key_values=given.get("past_key_values"),
            hidden_states=(torch.zeros(1),) if given.get("output_hidden_states") else None,
        )


def token(value: int) -> Tensor:
    return torch.tensor([[value]])


def test_the_second_call_of_a_form_is_recorded_and_each_further_one_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    replays, model = Replays(monkeypatch), Counting()
    decode = RecordedDecoding(model)
    for value in range(5):
        decode(input_ids=token(value), use_cache=True)
    assert (model.calls, replays.recorded, replays.replayed) == (2, 1, 4)
    assert decode.inputs["input_ids"].item() == 4  # what a replay reads


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": torch.zeros(2, 1, dtype=torch.long)},
        {"input_ids": torch.zeros(1, 1, dtype=torch.int32)},
        {"use_cache": False},
        {"attention_mask": torch.ones(1, 1)},
    ],
    ids=str,
)
def test_a_call_of_another_form_is_computed(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    replays, model = Replays(monkeypatch), Counting()
    decode = RecordedDecoding(model)
    given = {"input_ids": token(1), "use_cache": True}
    for _ in range(3):
        decode(**given)
    before = model.calls
    decode(**{**given, **other})
    assert model.calls == before + 1
    decode(**given)
    assert (model.calls, replays.recorded, replays.replayed) == (before + 2, 1, 2)


@pytest.mark.parametrize("wish", [{"output_hidden_states": True}, {"labels": token(0)}], ids=["hidden states", "loss"])
def test_whoever_wants_more_than_logits_has_it_computed(monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any]) -> None:
    replays, model = Replays(monkeypatch), Counting()
    decode = RecordedDecoding(model)
    for _ in range(4):
        decode(input_ids=token(1), **wish)
    assert (model.calls, replays.recorded) == (4, 0)


def test_a_cache_that_moved_is_another_form() -> None:
    cache = StaticCache(config=llama_config(), max_cache_len=8)
    for layer in cache.layers:
        layer.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    before = recorded_decoding._form({"past_key_values": cache})
    cache.layers[0].update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8))
    assert recorded_decoding._form({"past_key_values": cache}) == before
    cache.reorder_cache(torch.tensor([1, 0]))
    assert recorded_decoding._form({"past_key_values": cache}) != before


def test_a_forward_that_cannot_be_recorded_is_computed_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Replays(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(recorded_decoding.logger, "warning", said.append)

    class Refused:
        def __init__(self, graph: object, stream: object) -> None: ...

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "graph", Refused)
    model = Counting()
    decode = RecordedDecoding(model)
    logits = [decode(input_ids=token(value)).logits.item() for value in range(5)]
    assert logits == [0, 2, 4, 6, 8]
    assert len(said) == 1
    assert "one by one: operation not permitted when stream is capturing" in said[0]
    assert "more" not in said[0]


def test_who_asks_for_a_compiled_forward_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    _, ours = twins(llama_config())
    assert isinstance(ours.get_compiled_call(None), RecordedDecoding)
    assert not isinstance(ours.get_compiled_call(CompileConfig()), RecordedDecoding)
    dynamic = llama_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0})
    assert not isinstance(twins(dynamic)[1].get_compiled_call(None), RecordedDecoding)
    spread = twins(llama_config())[1]
    spread.lm_head.to("meta")
    assert not isinstance(spread.get_compiled_call(None), RecordedDecoding)


class TestOnAGpu:
    pytestmark = needs_cuda

    @pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
    @pytest.mark.parametrize(
        "choice", [{"do_sample": False}, {"do_sample": True, "top_k": 8}, {"num_beams": 3}], ids=str
    )
    def test_a_recording_gives_the_tokens_of_single_kernels(self, rope: dict[str, Any], choice: dict[str, Any]) -> None:
        torch.manual_seed(0)
        config = llama_config(rope_parameters=rope, eos_token_id=None)
        ours = twins(config, torch.float64)[1].cuda()
        input_ids = torch.randint(1, 61, (2, 9), device="cuda")
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :4] = 0
        tokens = []
        for static in ("static", None):
            torch.manual_seed(1)
            options = {"max_new_tokens": 24, "pad_token_id": 0, "cache_implementation": static, **choice}
            tokens.append(ours.generate(input_ids, attention_mask=attention_mask, **options))
        assert torch.equal(*tokens)

    def test_tokens_are_replayed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = twins(llama_config(eos_token_id=None))[1].cuda()
        calls = count_calls(ours, monkeypatch)
        input_ids = torch.randint(1, 61, (1, 9), device="cuda")
        for _ in range(2):  # a second text has a cache of its own
            ours.generate(input_ids, max_new_tokens=24, do_sample=False, cache_implementation="static", pad_token_id=0)
        assert len(calls) <= 2 * 4  # the prompt, the first token, the recording, and the last token, which has no mask

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_a_model_on_another_than_the_current_device_is_recorded_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also behind a recording on the current one, whose stream torch would take again."""
        ours = twins(llama_config(eos_token_id=None), torch.float64)[1]
        calls = count_calls(ours, monkeypatch)
        options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        for device in ("cuda:0", "cuda:1"):
            input_ids = torch.randint(1, 61, (1, 9), device=device)
            expected = ours.to(device).generate(input_ids, **options)
            calls.clear()
            assert torch.equal(ours.generate(input_ids, cache_implementation="static", **options), expected)
            assert len(calls) <= 4
            assert torch.cuda.current_device() == 0

    def test_what_waits_for_the_device_goes_on_kernel_by_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = twins(llama_config(eos_token_id=None), torch.float64)[1].cuda()
        input_ids = torch.randint(1, 61, (1, 9), device="cuda")
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected = ours.generate(input_ids, **options)
        forward = ours.model.norm.forward
        monkeypatch.setattr(ours.model.norm, "forward", lambda x: forward(x + 0 * float(x.sum())))
        assert torch.equal(ours.generate(input_ids, cache_implementation="static", **options), expected)


def count_calls(model: ZooLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each forward of the first block."""
    calls: list[int] = []
    layer = model.model.layers[0]
    forward = layer.forward

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(1)
        return forward(*given, **more)

    monkeypatch.setattr(layer, "forward", counted)
    return calls
