"""From settings to what has to be compiled: the model without weights, its routing, and the spec that names an
artifact.

`command=compile` and `command=run` both come through here, so that they cannot disagree about what a step is.
"""

from __future__ import annotations

import hashlib
import inspect
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import backends
import compiled
import modelzoo
from apps.training import optimizers
from apps.training.activations import planned_activations
from apps.training.compilers import device_kind
from apps.training.config_schema import TrainConfig
from apps.training.config_yaml import written
from apps.training.distilling import teacher_backends, teacher_config
from apps.training.head_chunks import head_chunks, logit_bytes
from apps.training.lora import add_updates, spec_fields
from apps.training.loss import loss_terms
from apps.training.optimizers import Optimizer
from apps.training.parameter_groups import ParameterGroup, groups_table, parameter_groups, rules_of
from backends.errors import UserError
from backends.lora import Lora
from backends.precision import PrecisionPolicy
from backends.routing import Plan, route
from backends.routing_table import shorten
from compiled.mlir.compilers import describe_target
from compiled.spec import StepSpec, describe_device, describe_versions

DEFAULT_MODEL = "demo"
# Fields of a Hugging Face config that change no tensor of the train step.
_NOT_IN_GRAPH = frozenset(
    "architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype initializer_range model_type use_cache "
    "transformers_version _name_or_path id2label label2id output_attentions output_hidden_states return_dict "
    "problem_type chunk_size_feed_forward is_encoder_decoder pretraining_tp attention_dropout".split()
)
# Settings of the sections above that an artifact does not depend on, or that are written out anyway.
_NOT_COMPILED = (
    *("max_seq_length", "verbose", "debug", "workers", "calibrate_steps", "merge"),
    *("mlir.whole_step", "mlir.timeout_s", "mlir.memory_gb"),
)
# What the graphs of any step are made of beside zoo and compile room, in the folder of the backends.
_TRACED = (
    *("articles", "joint", "layers", "lora", "split_masters", "state", "stochastic_rounding"),
    *("kernels/cross_entropy", "kernels/dither", "kernels/external", "kernels/in_capture", "kernels/rms_norm"),
    *("kernels/triton_cross_entropy", "kernels/triton_functions", "kernels/triton_rms_norm"),
)


@dataclass(frozen=True)
class StepPlan:
    """One train step before any weight exists: zoo config, model on the meta device, routing, dtypes, optimizer."""

    model_name: str
    model_config: Any
    model: Any
    routing: Plan
    lora: Lora | None
    precision: PrecisionPolicy
    groups: list[ParameterGroup]
    spec: StepSpec
    teacher_config: Any | None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters by the names of training.token_budget; the projection to the vocabulary is an embedding too."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        tables = {parameter for module in ends for parameter in module.parameters()}  # a tied one is one parameter
        return {
            "N": self.num_parameters,
            "N_non_embedding": self.num_parameters - sum(table.numel() for table in tables),
        }

    def bare_teacher(self) -> Any | None:
        """The teacher without weights; None where there is none."""
        if self.teacher_config is None:
            return None
        return modelzoo.build_meta(self.teacher_config, dtype=self.precision.parameters)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The update rule of each trained parameter, by its full name."""
        return rules_of(self.groups)

    @property
    def tables(self) -> str:
        """What computes which layer, and what updates which parameter, for a report."""
        return f"{self.routing.table()}\n\nParameter groups:\n{groups_table(self.groups)}"

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def parameters_text(self) -> str:
        """How many parameters, and what trains them when it is not all."""
        text = f"{self.num_parameters:,} parameters"
        if self.lora is None:
            return text
        layers = ", ".join(shorten(self.lora.layers))
        norms = " and the norms" if self.lora.train_norms else ""
        return (
            f"{text}, {self.num_trained:,} of them trained: LoRA of rank {self.lora.r}, alpha {self.lora.alpha:g}, "
            f"in {len(self.lora.layers)} layers ({layers}){norms}"
        )


def plan_step(config: TrainConfig) -> StepPlan:
    """Read the model's config (never its weights), route it, and say what the step is compiled for."""
    target = config.compile.target
    kind = "cpu" if target == "mlir" else device_kind(config.compile.arch)
    if target == "mlir":
        _require_lowerable(config.precision.rounding, config.compile.mlir.dialect)
    name, model_config = read_model_config(config)
    model = modelzoo.build_meta(model_config, dtype=config.model.dtype)
    routing = route(model, config.backend.rules, config.backend.default)
    updates = add_updates(config.lora, model, config.training.seed)
    groups = parameter_groups(config.optimizer, model)
    teacher = teacher_config(config, model_config.vocab_size)
    width = logit_bytes(kind, config.precision, with_teacher=teacher is not None)
    logits_a_token = model_config.vocab_size * (1 if teacher is None else 2)  # the teacher has as many
    tokens = config.training.batch_size * config.model.max_seq_length
    spec = StepSpec(
        model_name=name,
        model=_graph_fields(model_config),
        routing=_routing_fields(routing),
        batch_size=config.training.batch_size,
        max_seq_length=config.model.max_seq_length,
        precision=config.precision.named(),
        article_attention=config.model.article_attention,
        head_chunks=head_chunks(config.compile.head_chunks, tokens, width * logits_a_token, kind),
        optimizer=_optimizer_fields(config.optimizer.name, groups),
        device=describe_device(kind),
        versions=describe_versions(kind) | {"source": _source_fingerprint()},
        activations=planned_activations(config, kind, model_config, model, groups),
        deterministic=kind == "cpu" or config.training.deterministic,
        lora=spec_fields(updates),
        skips_nonfinite=config.training.max_nonfinite_steps > 0,
        loss_terms=list(loss_terms(config.training)),
        teacher={} if teacher is None else _graph_fields(teacher) | teacher_backends(teacher, config.model.dtype),
        target=describe_target(config.compile.mlir.dialect, config.compile.mlir.compiler) if target == "mlir" else {},
    )
    return StepPlan(name, model_config, model, routing, updates, config.precision, groups, spec, teacher)


def _require_lowerable(rounding: str, dialect: str) -> None:
    """UserError for updates that torch-mlir has no operators for: it would be found after minutes of lowering."""
    if rounding == "split":
        raise UserError(
            "optimizer.master_weights=split looks at the bits of numbers, which torch-mlir lowers to nothing, got "
            "compile.target=mlir. Use optimizer.master_weights=float32: the same training."
        )
    if rounding == "stochastic" and dialect in ("linalg", "tosa"):
        raise UserError(
            "optimizer.master_weights=stochastic looks at the bits of numbers, which torch-mlir does not lower to "
            f"{dialect}, got compile.target=mlir. "
            "Use optimizer.master_weights=float32, or compile.mlir.dialect=stablehlo."
        )


def read_model_config(config: TrainConfig) -> tuple[str, Any]:
    """The model's display name and its zoo config with this run's zoo arguments."""
    names = config.checkpoint
    config_name = names.config_name
    if config_name is None and names.model_name_or_path is None:
        config_name = DEFAULT_MODEL
    settings = config.model
    model_config = modelzoo.load_config(
        config_name=config_name,
        model_name_or_path=names.model_name_or_path,
        compute_dtype=settings.compute_dtype,
        norm_dtype=settings.norm_dtype,
        residual_dtype=settings.residual_dtype,
        logits_dtype=settings.logits_dtype,
        article_attention=settings.article_attention,
        drop_attention=settings.attention_dropout,
        drop_residual=settings.residual_dropout,
        drop_embedding=settings.embedding_dropout,
        max_seq_length=settings.max_seq_length,
    )
    return Path(str(config_name or names.model_name_or_path)).resolve().name, model_config


def compile_command(config: TrainConfig) -> str:
    """The command that compiles the artifact this run needs, ready to paste."""
    sections = ("model", "compile", "backend", "lora")
    defaults = {section: vars_of(type(getattr(config, section))()) for section in sections}
    arguments = ["command=compile"]
    for key in ("config_name", "model_name_or_path"):
        if getattr(config.checkpoint, key) is not None:
            arguments.append(f"checkpoint.{key}={getattr(config.checkpoint, key)}")
    arguments += [
        f"model.max_seq_length={config.model.max_seq_length}",
        f"training.batch_size={config.training.batch_size}",
    ]
    for section, default in defaults.items():
        for key, value in vars_of(getattr(config, section)).items():
            if value != default[key] and key not in _NOT_COMPILED:
                arguments.append(f"{section}.{key}={written(value)}")
    arguments += ["training.deterministic=true"] if config.training.deterministic else []
    skipping = config.training.max_nonfinite_steps
    arguments += [f"training.max_nonfinite_steps={skipping}"] if skipping else []
    distill = config.training.distill.model_name_or_path
    arguments += [] if distill is None else [f"training.distill.model_name_or_path={distill}"]
    for name, value in loss_terms(config.training).items():
        arguments.append(f"training.{name.replace('distill_', 'distill.')}={value}")
    optimizer, standard = config.optimizer, type(config.optimizer)()
    arguments += [f"optimizer={optimizer.name}"] if optimizer.name != standard.name else []
    for key in ("moments_dtype", "master_weights", "groups"):
        if getattr(optimizer, key) != getattr(standard, key):
            arguments.append(f"optimizer.{key}={written(getattr(optimizer, key))}")
    chosen = optimizers.load(optimizer.name)
    for key in chosen.structure:
        if getattr(optimizer.settings, key) != getattr(chosen.Config(), key):
            arguments.append(f"optimizer.{key}={written(getattr(optimizer.settings, key))}")
    return "python apps/train_llm.py " + " ".join(map(shlex.quote, arguments))


def vars_of(settings: Any) -> dict[str, Any]:
    """The fields of one section by name, those of a section inside it by `section.name`."""
    fields: dict[str, Any] = {}
    for name in type(settings).__dataclass_fields__:
        value = getattr(settings, name)
        if is_dataclass(value):
            fields |= {f"{name}.{inner}": field for inner, field in vars_of(value).items()}
        else:
            fields[name] = value
    return fields


def _graph_fields(model_config: Any) -> dict[str, Any]:
    fields = {key: value for key, value in model_config.to_dict().items() if key not in _NOT_IN_GRAPH}
    for key in ("compute_dtype", "norm_dtype", "residual_dtype", "logits_dtype", "article_attention", "max_seq_length"):
        fields.pop(key, None)  # these stand, resolved, in fields of the spec of their own
    return {key: value for key, value in fields.items() if value or not key.startswith("drop_")}


def _routing_fields(routing: Plan) -> dict[str, Any]:
    """Layers by backend, whatever the rules were called that put them there."""
    layers: dict[str, list[str]] = {}
    fingerprints = {}
    for row in routing.routes:
        layers.setdefault(str(row.backend), []).extend(row.layers)
        fingerprints[str(row.backend)] = row.backend.fingerprint()[:12]
    return {
        backend: {"layers": ", ".join(sorted(shorten(sorted(names)))), "source": fingerprints[backend]}
        for backend, names in sorted(layers.items())
    }


def _optimizer_fields(name: str, groups: Sequence[ParameterGroup]) -> dict[str, Any]:
    """The optimizer's name, its code and its settings of the graph; with several rules, those of each and its names."""
    by_key: dict[str, tuple[Optimizer, list[str]]] = {}
    for group in groups:
        by_key.setdefault(group.rule.key, (group.rule, []))[1].extend(group.shapes)
    own = {key: {"source": _rule_fingerprint(rule)} | rule.fixed for key, (rule, _) in by_key.items()}
    if len(own) == 1:
        return {"name": name, **next(iter(own.values()))}
    return {
        "name": name,
        "rules": {
            key: fields | {"parameters": ", ".join(shorten(sorted(by_key[key][1])))} for key, fields in own.items()
        },
    }


def _rule_fingerprint(rule: Optimizer) -> str:
    """Of the files that a rule's class and its bases lie in, and of the code that optimizers share."""
    files = {Path(inspect.getfile(base)) for base in type(rule).__mro__[:-1]}
    files |= set(Path(optimizers.__path__[0]).glob("_[!_]*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]


def _source_fingerprint() -> str:
    """Of the code that makes graphs (zoo, compile room, layers, norm and loss): another one, other artifacts.

    What a backend computes with is in its own fingerprint, so that editing one backend leaves the others' artifacts.
    """
    folders = [Path(module.__path__[0]) for module in (modelzoo, compiled)]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    files += [Path(backends.__path__[0], f"{name}.py") for name in _TRACED]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:12]
