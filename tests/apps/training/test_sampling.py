"""The report's sample text: the same for the same seed, from the prompt or from the data, never in the way."""

from pathlib import Path

import pytest
import torch

import modelzoo
from apps.training.data.storage import Dataset, open_dataset
from apps.training.sampling import sample_text


@pytest.fixture
def dataset(tiny_dataset: Path) -> Dataset:
    return open_dataset(tiny_dataset, max_seq_length=32, vocab_size=300)


def sample(tiny_model: Path, dataset: Dataset, prompt: str | None, seed: int = 1) -> tuple[str, str] | None:
    model = modelzoo.build_model(modelzoo.load_config(config_name=tiny_model)).train()
    text = sample_text(model, dataset.tokenizer_folder, prompt=prompt, rows=dataset.train, seed=seed)
    assert model.training
    return text


def test_the_seed_decides_and_the_runs_own_random_numbers_stay_untouched(tiny_model: Path, dataset: Dataset) -> None:
    before = torch.random.get_rng_state()
    first = sample(tiny_model, dataset, "the quick")
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == sample(tiny_model, dataset, "the quick")
    assert first != sample(tiny_model, dataset, "the quick", seed=2)
    assert first[0] == "the quick"
    assert first[1]


def test_without_a_prompt_the_data_begins(tiny_model: Path, dataset: Dataset) -> None:
    prompt, _ = sample(tiny_model, dataset, None)
    assert set(prompt.split()[:-1]) <= set(
        "the quick brown fox jumps over lazy dog while seven wizards box with five jugs of ink".split()
    )


def test_a_long_prompt_is_cut_on_the_left_and_an_empty_one_gives_nothing(tiny_model: Path, dataset: Dataset) -> None:
    prompt, _ = sample(tiny_model, dataset, "the fox jumps over the dog " * 200)
    assert prompt.endswith("the dog ")
    assert len(prompt) < 2000
    assert sample(tiny_model, dataset, "") is None


def test_a_models_own_ways_to_generate_are_not_the_reports(tiny_model: Path, dataset: Dataset) -> None:
    model = modelzoo.build_model(modelzoo.load_config(config_name=tiny_model)).train()
    arguments = {"prompt": "the quick", "rows": dataset.train, "seed": 1}
    plain = sample_text(model, dataset.tokenizer_folder, **arguments)
    model.generation_config.update(num_beams=3, repetition_penalty=5.0)
    own = model.generation_config.to_dict()
    assert sample_text(model, dataset.tokenizer_folder, **arguments) == plain
    assert model.generation_config.to_dict() == own


def test_a_sample_stays_within_the_positions_of_the_model(
    tiny_model: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = modelzoo.build_model(modelzoo.load_config(config_name=tiny_model))
    model.config.max_position_embeddings = 48
    generate, lengths = model.generate, []

    def seen(ids: torch.Tensor, **given: object) -> torch.Tensor:
        lengths.append((ids.shape[1], given["max_new_tokens"]))
        return generate(ids, **given)

    monkeypatch.setattr(model, "generate", seen)
    for prompt in ("the quick", "the fox jumps over the dog " * 200):
        assert sample_text(model, dataset.tokenizer_folder, prompt=prompt, rows=dataset.train, seed=1)
    assert [new for _, new in lengths] == [24, 24]
    assert lengths[0][0] < lengths[1][0] == 24
