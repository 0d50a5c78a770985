"""What stands beside our step: it trains, does the same work, and says when it is not installed."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apps.training.random_step import random_batch
from apps.training.step_plan import plan_step
from backends.articles import article_mask
from benchmarks.peers import Missing, peer_step
from tests.apps.training.plans import settings_of, write_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("settings", [(), ("model.article_attention=true",)])
def test_a_peer_trains_in_the_parameters_dtype(
    tmp_path: Path, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    build = LlamaForCausalLM.__init__

    def remember(self: LlamaForCausalLM, *arguments: object, **options: object) -> None:
        build(self, *arguments, **options)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", remember)
    config = settings_of(write_config(tmp_path / "tiny"), "model.dtype=bfloat16", *settings)
    step = peer_step("eager", plan_step(config), CPU, recomputes=bool(settings))
    (model,) = made
    before = model.lm_head.weight.detach().clone()
    step()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert not torch.equal(model.lm_head.weight, before)
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == bool(settings)
    assert torch.get_default_dtype() == torch.float32


def test_transformers_takes_the_mask_of_articles_as_it_is(tmp_path: Path) -> None:
    """Each article's logits are those it has alone, at its own positions."""
    plan = plan_step(settings_of(write_config(tmp_path / "tiny"), "model.article_attention=true"))
    config = LlamaConfig(**plan.spec.model)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 96, (1, 16))
    articles = torch.tensor([[1] * 5 + [2] * 11], dtype=torch.int32)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=article_mask(articles)).logits
        places = torch.arange(16)[None]
        for part in (slice(0, 5), slice(5, 16)):
            alone = model(input_ids=ids[:, part], position_ids=places[:, part]).logits
            torch.testing.assert_close(whole[:, part], alone)


def test_random_articles_have_the_length_that_is_said(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "tiny", max_position_embeddings=32768)
    settings = ("model.article_attention=true", "model.max_seq_length=32768", "training.batch_size=8")
    articles = random_batch(plan_step(settings_of(folder, *settings)), CPU)["article_ids"]
    assert articles.dtype == torch.int32
    assert (articles.diff(dim=1) >= 0).all()
    assert articles[:, -1].float().mean() == pytest.approx(32768 / 512, rel=0.2)


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(Missing, match="liger-kernel is not installed"):
        peer_step("liger", plan_step(settings_of(write_config(tmp_path / "tiny"))), CPU)
