"""One small compiled step for the whole room: compiling takes seconds, so tests share artifacts and copy models."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

import modelzoo
from apps.training.config import parse
from apps.training.hyperparameters import hyperparameter_table
from apps.training.step_plan import StepPlan, plan_step
from backends.precision import as_torch, at_least_float32
from backends.routing import route
from compiled.artifact import Artifact, open_artifact
from compiled.build import build
from compiled.mlir.lowering import MlirOptions
from compiled.program import CompiledProgram
from tests.compiled.step_worker import add_random_updates
from tests.region_cache import equal_regions_made_once

RECOMPUTED = "run.recompute=block"  # no part of the step: the artifact is that of the other settings


@dataclass
class Compiled:
    """A compiled step with everything needed to run it next to its eager twin."""

    plan: StepPlan
    artifact: Artifact
    rules: list[dict[str, Any]]
    recomputed: int = 0  # blocks, by its programs

    def model(self, seed: int = 1) -> Any:
        model = modelzoo.build_model(self.plan.model_config, dtype=self.plan.precision.parameters, seed=seed)
        route(model, self.rules)
        if self.plan.lora is not None:
            add_random_updates(model, self.plan.lora)
        return model.train()

    def program(self, model: Any, **options: Any) -> CompiledProgram:
        master = self.plan.precision.master
        return CompiledProgram(
            self.artifact,
            model,
            moments_dtype=as_torch(self.plan.precision.moments),
            master_dtype=None if master == "none" else as_torch(master),
            loss_terms=self.loss_terms,
            teacher=self.teacher(),
            recomputed=self.recomputed,
            **options,
        )

    def teacher(self) -> Any:
        """The teacher with random weights; None for a step without one."""
        if self.plan.teacher_config is None:
            return None
        return modelzoo.build_model(self.plan.teacher_config, dtype=self.plan.precision.parameters, seed=2).eval()

    @property
    def loss_terms(self) -> dict[str, float]:
        """Numbers for the terms that the step was compiled with."""
        numbers = {"label_smoothing": 0.1, "z_loss": 0.02, "distill_weight": 0.7, "distill_temperature": 2.0}
        return {name: numbers[name] for name in self.plan.spec.loss_terms}

    def batch(self, seed: int, counted: float = 1.0, of: int | None = None) -> dict[str, Tensor]:
        """A random batch; a share `counted` of its positions enters the loss, each with weight 1 / `of`."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.plan.spec.batch_size, self.plan.spec.max_seq_length)
        vocabulary = self.plan.model_config.vocab_size
        mask = torch.rand(shape, generator=generator) < counted
        scale = mask.to(as_torch(at_least_float32(self.plan.precision.logits))) / (of or max(int(mask.sum()), 1))
        batch = {
            "input_ids": torch.randint(0, vocabulary, shape, generator=generator),
            "labels": torch.randint(0, vocabulary, shape, generator=generator),
            "grad_scale": scale,
        }
        if self.plan.spec.article_attention:
            batch["article_ids"] = (torch.rand(shape, generator=generator) < 0.2).cumsum(1).to(torch.int32)
        return batch

    def hyperparameters(self, model: Any, step: int, lr: float = 1e-3) -> Tensor:
        """The numbers of a step at the same rate for all parameters."""
        return self.table(model, step, lambda peak: lr)

    def table(self, model: Any, step: int, rate: Callable[[float], float]) -> Tensor:
        work = torch.float64 if self.plan.precision.parameters == "float64" else torch.float32
        names = [name for name, _ in model.named_parameters()]
        seed = 5 if self.plan.precision.rounding == "stochastic" else None
        return hyperparameter_table(names, self.plan.groups, step=step, rate=rate, dtype=work, rounding_seed=seed)


Compile = Callable[..., Compiled]


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a small Llama config.json; keyword arguments change fields."""
    import json

    def write(**fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("config")
        config = {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 96,
            "max_position_embeddings": 64,
        }
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    return write


@pytest.fixture(scope="session")
def plan_of(tiny_config: Callable[..., Path]) -> Callable[..., StepPlan]:
    """The plan of a small step; `settings` are written as on the command line, keywords change the model."""

    def plan(*settings: str, **fields: Any) -> StepPlan:
        shape = ["training.batch_size=2", "model.max_seq_length=16", "compile.arch=cpu"]
        shape = [default for default in shape if not any(s.startswith(default.split("=")[0]) for s in settings)]
        return plan_step(
            parse(["command=compile", f"checkpoint.config_name={tiny_config(**fields)}", *shape, *settings])
        )

    return plan


@pytest.fixture(scope="session")
def compile_step(plan_of: Callable[..., StepPlan], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a small step once per session and setting, also where several workers run the tests.

    `anew`: takes no machine code from other steps.
    """
    made: dict[str, Compiled] = {}
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def compile_once(
        *settings: str, rules: tuple[dict[str, Any], ...] = (), anew: bool = False, **fields: Any
    ) -> Compiled:
        step = tuple(setting for setting in settings if setting != RECOMPUTED)
        if step != settings:
            again = compile_once(*step, rules=rules, anew=anew, **fields)
            return replace(again, recomputed=again.plan.model_config.num_hidden_layers)
        key = repr((settings, rules, anew, fields))
        if key not in made:
            written = ", ".join("{" + ", ".join(f"{k}: {v!r}" for k, v in rule.items()) + "}" for rule in rules)
            plan = plan_of(*settings, f"backend.rules=[{written}]", **fields)
            # A setting that is not part of the step must still be compiled afresh: the name holds what was asked for.
            path = shared / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{plan.spec.key}.substrate"
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    target = plan.spec.target
                    mlir = MlirOptions(target["dialect"], compiler=target.get("compiler")) if target else None
                    how = (plan.spec, plan.optimizers, plan.precision)
                    # In this process, where Inductor is set up once for all tests; forks would do it for each artifact.
                    # torch-mlir is set up in a process of its own.
                    workers = None if mlir else 1
                    with contextlib.nullcontext() if anew else equal_regions_made_once():
                        content = build(plan.model, *how, teacher=plan.bare_teacher(), mlir=mlir, workers=workers)
                    path.with_suffix(".part").write_bytes(content)
                    path.with_suffix(".part").rename(path)
            made[key] = Compiled(plan, open_artifact(path), list(rules))
        return made[key]

    return compile_once


@pytest.fixture(scope="session")
def tiny(compile_step: Compile) -> Compiled:
    """The plain case in float64: rounding cannot hide a wrong formula."""
    return compile_step("model.dtype=float64")
