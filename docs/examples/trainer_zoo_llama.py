"""Train a zoo Llama with the Hugging Face Trainer, linears and attention products computed by a backend.

    python docs/examples/trainer_zoo_llama.py                    simulated optics, by the rules file that ships
    python docs/examples/trainer_zoo_llama.py optical-4bit       another file of rules
    python docs/examples/trainer_zoo_llama.py my_rules.yaml

The model is small and random and the data is made here (rows that count up, from anywhere, modulo the vocabulary), so
that it runs offline in seconds. The zoo Llama is a Hugging Face model as any other: for weights of your own take
`modelzoo.load_model(FOLDER, config)`; `modelzoo.save_model` writes a checkpoint that plain transformers opens. It needs
this project and accelerate installed.
"""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments

import modelzoo
from backends import read_rules, route
from modelzoo.llama_config import ZooLlamaConfig

VOCABULARY, LENGTH, ROWS = 64, 32, 512


def make_model() -> torch.nn.Module:
    config = ZooLlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return modelzoo.build_model(config, seed=0)


def make_data() -> list[dict[str, torch.Tensor]]:
    rows = (torch.arange(LENGTH) + torch.randint(VOCABULARY, (ROWS, 1))) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def main(rules_file: str = "optical") -> None:
    torch.manual_seed(0)
    model = make_model()
    rules = read_rules(rules_file)
    print(route(model, rules.rules, rules.default or "dense").table())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=2,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=make_data())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"Loss before: {losses[0]:.4f}, after: {losses[-1]:.4f}")

    # What the backend learned about the signals of one layer: its state lies in the model's buffers.
    for name, buffer in model.model.layers[0].mlp.up_proj.named_buffers():
        print(f"State {name}: {[round(value, 4) for value in buffer.flatten().tolist()]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
