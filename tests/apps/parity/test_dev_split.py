"""Loss, perplexity and KL over the dev split, against the trainer's own evaluation and torch.distributions."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from apps.parity.batches import Batches, find_dataset
from apps.parity.dev_split import compare_on
from apps.training.data.loader import dev_batches
from apps.training.eager_program import EagerProgram
from apps.training.loss import make_batch, microbatches
from backends.precision import resolve
from backends.routing import route
from modelzoo import build_model, load_config
from tests.apps.parity.known_errors import LOUDER, settings_for


def test_it_is_the_trainers_evaluation_of_both_models(tiny_dataset: Path, tiny_model: Path) -> None:
    settings = settings_for(tiny_dataset, tiny_model)
    config = load_config(config_name=tiny_model)
    reference, other = (build_model(config).eval() for _ in range(2))
    route(other, [{"match": "*.mlp.*", "use": LOUDER, "error": 0.3}])
    dataset = find_dataset(settings, config.vocab_size)
    batches = Batches(dataset, settings, torch.device("cpu"))
    found = compare_on(reference, other, batches.dev(), lambda: None)

    for model, evaluation in ((reference, found.reference), (other, found.other)):
        program, losses, counts = EagerProgram(model, precision=resolve()), 0.0, 0
        for rows in dev_batches(dataset, 4):
            batch = make_batch(rows)
            (tensors,) = microbatches([batch], device="cpu", dtype=torch.float32)
            losses += program.evaluate(tensors).item() * batch.num_counted
            counts += batch.num_counted
        assert evaluation.num_counted == counts
        assert evaluation.loss == pytest.approx(losses / counts, rel=1e-6)

    divergence, positions = 0.0, 0
    for rows in dev_batches(dataset, 1):
        batch = make_batch(rows)
        with torch.no_grad():
            ours, theirs = (Categorical(logits=m(batch.input_ids).logits.double()) for m in (reference, other))
        divergence += kl_divergence(ours, theirs)[batch.mask].sum().item()
        positions += batch.num_counted
    assert found.kl == pytest.approx(divergence / positions, rel=1e-5)
    assert found.kl > 0


def test_a_model_is_at_no_distance_from_itself(tiny_dataset: Path, tiny_model: Path) -> None:
    settings = settings_for(tiny_dataset, tiny_model, eval_batches=2)
    config = load_config(config_name=tiny_model)
    model = build_model(config).eval()
    batches = Batches(find_dataset(settings, config.vocab_size), settings, torch.device("cpu"))
    done: list[int] = []
    found = compare_on(model, model, batches.dev(), lambda: done.append(1))
    assert found.kl == 0.0
    assert found.reference == found.other
    assert len(done) == batches.num_dev == 2


def test_positions_of_several_chunks_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from apps.parity import dev_split

    ours, theirs = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    mask = torch.rand(3, 5) > 0.5
    expected = kl_divergence(Categorical(logits=ours), Categorical(logits=theirs))[mask].sum()
    monkeypatch.setattr(dev_split, "_POSITIONS", 4)
    torch.testing.assert_close(dev_split._divergence(ours, theirs, mask), expected)
