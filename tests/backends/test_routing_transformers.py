"""Models of plain transformers, routed: nothing of them is known here but that they are made of nn.Linear."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends.layers import BackendLinear
from backends.routing import route
from tests.backends.tiny_transformer import SCALED

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
Built = tuple[nn.Module, dict[str, Tensor], Tensor]


def causal(config: Any) -> Built:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 50, (2, 7))
    return AutoModelForCausalLM.from_config(config), {"input_ids": ids}, ids


def llama() -> Built:
    from transformers import LlamaConfig

    return causal(LlamaConfig(vocab_size=50, num_key_value_heads=1, **SIZES))


def mistral() -> Built:
    from transformers import MistralConfig

    return causal(MistralConfig(vocab_size=50, num_key_value_heads=1, sliding_window=4, **SIZES))


def qwen2() -> Built:
    from transformers import Qwen2Config

    return causal(Qwen2Config(vocab_size=50, num_key_value_heads=1, tie_word_embeddings=True, **SIZES))


def roberta() -> Built:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=50, num_labels=3, **SIZES))
    return model, {"input_ids": torch.randint(3, 50, (2, 7))}, torch.tensor([0, 2])


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8)}, torch.tensor([0, 2])


# Linear layers: of a decoder 2 × (4 + 3) and the head; of an encoder 2 × (4 + 2) and its classifier's.
MODELS = pytest.mark.parametrize(
    ("build", "num_linears"), [(llama, 15), (mistral, 15), (qwen2, 15), (roberta, 14), (vit, 13)]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@MODELS
def test_every_linear_is_routed_and_dense_changes_no_bit(build: Callable[[], Built], num_linears: int) -> None:
    model, inputs, labels = build()
    model.eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = model(**inputs, labels=labels)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    planned = route(model, [{"match": "*", "use": "dense"}])
    assert sorted(planned.layers) == sorted(names)
    assert len(names) == num_linears
    assert all(isinstance(model.get_submodule(name), BackendLinear) for name in names)
    out = model(**inputs, labels=labels)
    assert torch.equal(out.logits, expected.logits)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@MODELS
def test_routed_layers_compute_with_their_backend_and_train(build: Callable[[], Built], num_linears: int) -> None:
    model, inputs, labels = build()
    rules = [{"match": "*", "use": SCALED, "levels": 16}]
    if "lm_head" in dict(model.named_children()):
        rules.append({"match": "lm_head", "use": SCALED, "levels": 4096})
    planned = route(model, rules)
    assert {backend.name for backend in map(planned.backend_of, planned.layers)} == {SCALED}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("proj.weight"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    counts = {name: int(buffer) for name, buffer in model.named_buffers() if name.endswith(".step")}
    assert set(counts.values()) == {6}
    assert len(counts) == num_linears
    assert all(buffer > 0 for name, buffer in model.named_buffers() if name.endswith(".max_abs"))


def test_a_plain_torch_model_is_routed_too() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    expected = model(x)
    assert list(route(model).layers) == ["0", "2.0", "3"]
    assert torch.equal(model(x), expected)
    route(model, [{"match": r"\d(\.\d)?", "syntax": "regex", "use": SCALED, "levels": 4}])
    assert not torch.equal(model(x), expected)
