"""Fine-tune a RoBERTa classifier whose linear layers are computed by a backend, in a plain training loop.

    python docs/examples/finetune_roberta.py                     simulated optics
    python docs/examples/finetune_roberta.py dense               the same loop on the exact products

The model is small and random and the data is made here, so that it runs offline in seconds: the label of a sentence is
whether it holds more tokens of the upper half of the vocabulary. For work of your own, put
`AutoModelForSequenceClassification.from_pretrained(...)` and a tokenized dataset in their place; the call of `route`
stays as it is. It needs this project and accelerate installed.
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import RobertaConfig, RobertaForSequenceClassification

from backends import route

VOCABULARY, LENGTH, ROWS = 100, 16, 512
SPECIAL = 4  # the tokens 0 … 3 are RoBERTa's own: padding and the like


def make_model() -> RobertaForSequenceClassification:
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 2,
        num_labels=2,
    )
    return RobertaForSequenceClassification(config)


def make_data() -> TensorDataset:
    ids = torch.randint(SPECIAL, VOCABULARY, (ROWS, LENGTH))
    labels = ((ids >= VOCABULARY // 2).sum(1) > LENGTH // 2).long()
    return TensorDataset(ids, labels)


def main(backend: str = "optical") -> None:
    torch.manual_seed(0)
    model, data = make_model(), make_data()

    # The one line that moves the model to another substrate, before anything wraps it.
    print(route(model, [{"match": "roberta.encoder.*", "use": backend}]).table())

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = DataLoader(data, batch_size=32, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    losses = []
    for _ in range(4):
        for ids, labels in batches:
            loss = model(input_ids=ids, labels=labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(f"Loss before: {losses[0]:.4f}, after: {losses[-1]:.4f}")

    # What the backend learned about the signals of one layer: its state lies in the model's buffers.
    layer = accelerator.unwrap_model(model).roberta.encoder.layer[0].intermediate.dense
    for name, buffer in layer.named_buffers():
        print(f"State {name}: {[round(value, 4) for value in buffer.flatten().tolist()]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
