"""Hugging Face config <-> zoo config: one family by exact type, idempotent, reversible, nested."""

from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from backends.errors import UserError
from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.families import Family, discover
from modelzoo.families.llama import FAMILY as LLAMA
from modelzoo.llama_config import ZooLlamaConfig
from tests.modelzoo.llamas import llama_config, llama_configs


class DerivedLlamaConfig(LlamaConfig):
    """Somebody's own Llama."""

    model_type = "derived_llama"


class PairConfig(PreTrainedConfig):
    """A config with two Llamas inside."""

    model_type = "pair"
    sub_configs: ClassVar[dict[str, type]] = {"writer": LlamaConfig, "reader": LlamaConfig}
    writer: PreTrainedConfig | None = None
    reader: PreTrainedConfig | None = None


class ZooPairConfig(PairConfig):
    """The zoo's counterpart."""

    model_type = "zoo_pair"
    tempo: int = 1


def nothing_to_check(config: PreTrainedConfig) -> None:
    """Accept every config."""


PAIR = Family(
    hf_config=PairConfig,
    zoo_config=ZooPairConfig,
    architectures={},
    zoo_arguments=("tempo",),
    check=nothing_to_check,
    model=lambda: object,
)


@given(config=llama_configs())
def test_there_and_back_gives_an_equal_config(config: LlamaConfig) -> None:
    before = config.to_dict()
    transformer = ConfigurationTransformer()
    zoo = transformer.transform(config, article_attention=True, compute_dtype="bfloat16")
    assert type(zoo) is ZooLlamaConfig
    assert zoo.architectures == ["ZooLlamaForCausalLM"]
    restored = transformer.restore(zoo)
    assert type(restored) is LlamaConfig
    assert restored == config
    assert restored.to_dict() == before == config.to_dict()


@given(config=llama_configs())
def test_transforming_again_changes_nothing(config: LlamaConfig) -> None:
    transformer = ConfigurationTransformer()
    once = transformer.transform(config, norm_dtype="float64")
    assert transformer.transform(once) == once
    assert transformer.restore(transformer.restore(once)) == transformer.restore(once)


def test_a_zoo_config_takes_new_arguments_and_keeps_the_others() -> None:
    transformer = ConfigurationTransformer()
    once = transformer.transform(llama_config(), norm_dtype="float64")
    twice = transformer.transform(once, article_attention=True)
    assert (twice.norm_dtype, twice.article_attention) == ("float64", True)
    assert not once.article_attention


def test_values_that_the_zoo_does_not_know_come_back() -> None:
    config = llama_config(somebodys_key={"a": [1, 2]}, pretraining_tp=2, dtype="bfloat16")
    transformer = ConfigurationTransformer()
    restored = transformer.restore(transformer.transform(config))
    assert restored.somebodys_key == {"a": [1, 2]}
    assert restored.to_dict() == config.to_dict()


def test_a_changed_zoo_config_is_restored_with_its_changes() -> None:
    transformer = ConfigurationTransformer()
    zoo = transformer.transform(llama_config())
    zoo.vocab_size = 77
    zoo.rope_parameters["rope_theta"] = 1e6
    restored = transformer.restore(zoo)
    assert (restored.vocab_size, restored.rope_parameters["rope_theta"]) == (77, 1e6)


def test_the_zoo_config_shares_nothing_with_the_original() -> None:
    config = llama_config()
    ConfigurationTransformer().transform(config).rope_parameters["rope_theta"] = 1.0
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("config_class", [DerivedLlamaConfig, MistralConfig])
def test_only_the_exact_type_matches(config_class: type[PreTrainedConfig]) -> None:
    with pytest.raises(UserError, match=f"Unknown config type '{config_class.__name__}'.*LlamaConfig"):
        ConfigurationTransformer().transform(config_class())


def test_two_families_for_one_type_are_refused() -> None:
    with pytest.raises(UserError, match="2 families match LlamaConfig"):
        ConfigurationTransformer([LLAMA, replace(LLAMA)]).transform(llama_config())


def test_an_unknown_argument_is_reported_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="Unknown zoo argument 'article_atention'. Did you mean 'article_attention'"):
        ConfigurationTransformer().transform(llama_config(), article_atention=True)


def test_an_unknown_architecture_is_reported() -> None:
    with pytest.raises(UserError, match="Unknown architecture 'LlamaForQuestionAnswering'"):
        ConfigurationTransformer().transform(llama_config(architectures=["LlamaForQuestionAnswering"]))


def test_nested_configs_are_transformed_and_restored() -> None:
    transformer = ConfigurationTransformer([LLAMA, PAIR])
    config = PairConfig(writer=llama_config(), reader=llama_config(hidden_size=64))
    zoo = transformer.transform(config, tempo=3, article_attention=True)
    assert (type(zoo), zoo.tempo) == (ZooPairConfig, 3)
    assert type(zoo.writer) is type(zoo.reader) is ZooLlamaConfig
    assert zoo.reader.article_attention
    assert zoo.reader.hidden_size == 64
    assert transformer.restore(zoo).to_dict() == config.to_dict()
    assert type(transformer.restore(zoo).writer) is LlamaConfig


def test_an_argument_that_no_nested_family_takes_is_reported() -> None:
    config = PairConfig(writer=llama_config(), reader=llama_config())
    with pytest.raises(UserError, match="Unknown zoo argument 'temmpo'. Did you mean 'tempo'"):
        ConfigurationTransformer([LLAMA, PAIR]).transform(config, temmpo=3)


def test_families_are_found_by_their_files() -> None:
    assert discover() == (LLAMA,)
