"""A frozen teacher in the compiled step: its regions, the eager twin, and nothing of it where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from backends.errors import UserError
from compiled.capture import Captured
from compiled.program import CompiledProgram
from compiled.schedule import Schedule, capture_step
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.interpreted import InterpretedArtifact
from tests.compiled.test_many_workers import distance

SETTINGS = ("model.dtype=float64", "compile.head_chunks=4")
PlanOf = Callable[..., StepPlan]


@pytest.fixture(scope="module")
def taught(tiny_config: Callable[..., Path]) -> tuple[str, ...]:
    """Settings of a teacher that is wider and deeper than the student."""
    folder = tiny_config(hidden_size=40, head_dim=12, intermediate_size=56, num_hidden_layers=3, rope_theta=500.0)
    return (*SETTINGS, f"training.distill.model_name_or_path={folder}", "training.distill.weight=0.7")


def captured(plan: StepPlan) -> tuple[dict[str, Captured], Schedule]:
    return capture_step(plan.model, plan.spec, plan.optimizers, plan.precision, plan.bare_teacher())


def test_a_teacher_adds_regions_and_changes_the_head_alone(plan_of: PlanOf, taught: tuple[str, ...]) -> None:
    (plain, without), (regions, schedule) = captured(plan_of(*SETTINGS)), captured(plan_of(*taught))
    assert without.teacher == {}
    added = {"teacher_embed_forward", "teacher_block_0_forward"}  # no backward, and one for three equal blocks
    assert regions.keys() - plain.keys() == added
    assert [part["forward"] for part in schedule.teacher["parts"]] == [
        "teacher_embed_forward",
        *["teacher_block_0_forward"] * 3,
    ]
    assert not any(part["trained"] for part in schedule.teacher["parts"])
    changed = {name for name in plain if regions[name].identity != plain[name].identity}
    assert changed == {"head_train"}
    assert not [spec.name for name in added for spec in regions[name].spec.outputs if spec.name.startswith("saved_")]


def test_logits_of_model_and_teacher_exist_for_a_chunk_only(plan_of: PlanOf, tiny_config: Callable[..., Path]) -> None:
    teacher = f"training.distill.model_name_or_path={tiny_config(hidden_size=40, head_dim=10, vocab_size=500)}"
    regions, _ = captured(plan_of(*SETTINGS, teacher, vocab_size=500))
    nodes = [node for each in regions.values() for node in each.graph.graph.nodes]
    wide = [tuple(value.shape) for node in nodes if hasattr(value := node.meta.get("val"), "shape")]
    logits = {shape for shape in wide if shape and shape[-1] == 500 and len(shape) > 1 and shape[0] not in (32, 40)}
    assert logits == {(8, 500)}  # 32 tokens in 4 chunks


def test_automatic_chunks_leave_room_for_both(plan_of: PlanOf, tiny_config: Callable[..., Path]) -> None:
    large = {"vocab_size": 2**20}
    teacher = f"training.distill.model_name_or_path={tiny_config(**large)}"
    alone, both = (plan_of(*settings, **large).spec.head_chunks for settings in ((), (teacher,)))
    assert (alone, both) == (2, 4)


def test_with_the_weight_of_the_teacher_alone_a_model_equal_to_it_has_nothing_to_learn(
    plan_of: PlanOf, tiny_config: Callable[..., Path]
) -> None:
    plan = plan_of(*SETTINGS, f"training.distill.model_name_or_path={tiny_config()}", "training.distill.weight=1")
    compiled = Compiled(plan, InterpretedArtifact(plan), [])
    model = compiled.model(seed=2)  # the teacher's
    terms = {"distill_weight": 1.0, "distill_temperature": 2.0}
    program = CompiledProgram(
        compiled.artifact, model, moments_dtype=torch.float64, master_dtype=None, loss_terms=terms,
        teacher=compiled.teacher(),
    )  # fmt: skip
    gradients = program.gradients([compiled.batch(1)])
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-14
    with pytest.raises(UserError, match="for another teacher"):
        CompiledProgram(
            compiled.artifact, model, moments_dtype=torch.float64, master_dtype=None, loss_terms=terms,
            teacher=torch.nn.Linear(2, 2),
        )  # fmt: skip


def assert_follows_the_twin(compiled: Compiled, clip: float | None, microbatches: int) -> None:
    ours, theirs = compiled.model(), compiled.model()
    program = compiled.program(ours)
    teacher = compiled.teacher()
    before = {name: each.detach().clone() for name, each in teacher.named_parameters()}
    twin = EagerProgram(theirs, precision=compiled.plan.precision, loss_terms=compiled.loss_terms, teacher=teacher)
    for step in range(1, 5):
        batches = [compiled.batch(10 * step + index, 0.7, of=20) for index in range(microbatches)]
        hyper = compiled.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, clip), twin.train_step(batches, hyper, clip)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
        assert result.objective is not None
        assert result.objective.item() == pytest.approx(expected.objective.item(), rel=1e-10)
        assert result.objective.item() != pytest.approx(result.loss.item(), rel=1e-3)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert distance(mine, other) <= 1e-8, name
    for name, each in teacher.named_parameters():
        assert torch.equal(each, before[name])
        assert each.grad is None
    batch = compiled.batch(99)
    assert program.evaluate(batch).item() == pytest.approx(twin.evaluate(batch).item(), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "microbatches"), [(None, 1), (0.05, 3)])
def test_training_equals_the_eager_twin(
    compile_step: Compile, taught: tuple[str, ...], clip: float | None, microbatches: int
) -> None:
    rules = ({"match": "*_proj", "use": "lowrank", "keep": 0.6},)
    assert_follows_the_twin(compile_step(*taught, rules=rules), clip, microbatches)


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        (("training.label_smoothing=0.1", "training.z_loss=1e-3"), {}),
        (("model.article_attention=true", "lora.r=4"), {"tie_word_embeddings": True}),
        (("model.residual_dropout=0.2", "run.recompute=block"), {"attention_bias": True}),
    ],
    ids=["other-terms", "articles-and-lora", "dropout"],
)
def test_variants_equal_the_eager_twin(
    plan_of: PlanOf, taught: tuple[str, ...], more: tuple[str, ...], fields: dict[str, bool]
) -> None:
    plan = plan_of(*taught, *more, **fields)
    assert_follows_the_twin(Compiled(plan, InterpretedArtifact(plan), []), None, 2)


def test_the_rows_of_a_step_may_be_cut_as_one_likes(plan_of: PlanOf, taught: tuple[str, ...]) -> None:
    """The sum over two microbatches of half the weight each is what two workers sum up."""
    plan = plan_of(*taught)
    compiled = Compiled(plan, InterpretedArtifact(plan), [])
    batches = [compiled.batch(seed, of=40) for seed in (1, 2)]
    program = compiled.program(compiled.model())
    both: dict[str, Tensor] = program.gradients(batches)
    each = [program.gradients([batch]) for batch in batches]
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, each[0][name] + each[1][name], rtol=1e-12, atol=1e-15)
