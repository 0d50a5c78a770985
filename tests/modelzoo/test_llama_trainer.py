"""The Hugging Face Trainer trains the zoo Llama as it trains transformers', and saves what transformers reads."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from tests.modelzoo.llamas import llama_config, twins

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which this project does not")


def rows() -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(0, 61, (16, 12))
    return [{"input_ids": row, "labels": row} for row in drawn]


@pytest.mark.filterwarnings("ignore")
def test_training_steps_equal_those_of_transformers(tmp_path: Path) -> None:
    theirs, ours = twins(llama_config())
    data = rows()
    for name, model in (("theirs", theirs), ("ours", ours)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model()
    for name, expected in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), expected), name
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(reloaded.get_parameter(name), weight) for name, weight in ours.named_parameters())
