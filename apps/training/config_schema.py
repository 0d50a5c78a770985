"""Every setting of a run: its name, type, default, range and one line of what it does. Imports no torch.

A field's metadata is what `--help` prints and what the checks enforce; `setting()` writes it. The settings of an
optimizer or a schedule are the fields of its own `Config` (`apps/training/optimizers/NAME.py`); on the command line and
in YAML they stand beside the common ones (`optimizer.lr=1e-3`), in Python they are `config.optimizer.settings.lr`.
"""

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from backends.precision import PrecisionPolicy, resolve

Dtype = Literal["float32", "bfloat16", "float64"]
AutoDtype = Literal["auto", "float32", "bfloat16", "float64"]


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    factory: Any = MISSING,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    allow_empty: bool = False,
) -> Any:
    """A dataclass field with its line of help and the range a value has to lie in.

    `key=` with nothing behind it is a mistake (a shell variable that is not set) unless `allow_empty`.
    """
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "allow_empty": allow_empty, **limits}
    return field(default=default, default_factory=factory, metadata=metadata)


def plugin(package: str) -> Any:
    """A field for the settings of the plugin that the section's `name` chooses: an instance of its `Config`."""
    return field(default=None, metadata={"plugin": package})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    max_seq_length: int = setting(256, "tokens in a row; fixed by the artifact", at_least=2)
    dtype: Dtype = setting("float32", "dtype the parameters are stored in")
    compute_dtype: AutoDtype = setting("auto", "dtype of the matrix products; auto: model.dtype")
    norm_dtype: AutoDtype = setting("auto", "dtype the norms are computed in; auto: at least float32")
    residual_dtype: AutoDtype = setting("auto", "dtype of the residual stream; auto: model.dtype")
    logits_dtype: AutoDtype = setting("auto", "dtype of logits and loss; auto: at least float32")
    article_attention: bool = setting(False, "tokens attend inside their own article only")
    attention_dropout: float = setting(0.0, "share of attention weights dropped in training", at_least=0, below=1)
    residual_dropout: float = setting(0.0, "the same of what blocks add to the residual", at_least=0, below=1)
    embedding_dropout: float = setting(0.0, "the same of the embedding", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    config_name: str | None = setting(None, "named model or folder with config.json; random weights; null: demo")
    model_name_or_path: str | None = setting(None, "folder with weights; command=compile reads only its config")
    save: bool = setting(False, "save checkpoints to go on from, in the background; the last step's too")
    save_path: str | None = setting(None, "where checkpoints go, as iter_STEP; null: OUTPUT_DIR/checkpoints")
    save_steps: int | list[int] = setting(1000, "save every so many steps, or after the steps of a list", at_least=1)
    keep: int | None = setting(None, "newest checkpoints to keep; null: all", at_least=1)
    load: bool = setting(False, "go on from a checkpoint")
    load_path: str | None = setting(None, "an iter_STEP folder, or a folder of them: the newest; null: save_path")
    num_steps: int | None = setting(None, "steps to take now, of the whole run's; null: to its end", at_least=1)
    overwrite_config: bool = setting(False, "settings given here replace those stored in the checkpoint")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    model_name_or_path: str | None = setting(None, "folder of a frozen teacher of the same vocabulary; null: none")
    weight: float = setting(0.5, "share of the loss that is T² · KL(teacher ‖ model)", above=0, at_most=1)
    temperature: float = setting(1.0, "T: logits of both are divided by it", above=0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    dataset: str | None = setting(None, "dataset folder; null: the embedded corpus, prepared when missing")
    batch_size: int = setting(8, "rows per worker and microbatch; fixed by the artifact", at_least=1)
    gradient_accumulation_steps: int = setting(1, "microbatches of a worker in a step", at_least=1)
    global_batch_size: int | None = setting(
        None, "rows of a step over all workers; sets gradient_accumulation_steps", at_least=1
    )
    max_steps: int | None = setting(None, "stop after this many steps; null: after num_epochs", at_least=1)
    token_budget: str | None = setting(None, "stop after so many tokens: 1e9, or 22*N/100 of N parameters")
    num_epochs: int = setting(1, "passes over the rows; more or fewer by max_steps, token_budget", at_least=1)
    seed: int = setting(42, "seed of the random weights and of the order of the rows", at_least=0, at_most=2**64 - 1)
    output_dir: str = setting("outputs/runs/default", "where checkpoint, metrics and report go")
    overwrite_output_dir: bool = setting(False, "replace another run found in output_dir")
    evaluate: bool = setting(True, "evaluate on the dev split at the end")
    eval_steps: int | None = setting(None, "evaluate every so many steps too", at_least=1)
    max_grad_norm: float | None = setting(1.0, "clip the gradients' global norm to this; null: do not clip", above=0)
    max_grad_value: float | None = setting(None, "clip each gradient to ± this, before the norm; null: no", above=0)
    max_nonfinite_steps: int = setting(
        0, "skip non-finite updates, stop at so many in a row; 0: stop at once", at_least=0
    )
    label_smoothing: float = setting(
        0.0, "share of the target spread over all tokens; part of the artifact", at_least=0, below=1
    )
    z_loss: float = setting(0.0, "weight of log² Z added to each token's loss; part of the artifact", at_least=0)
    resume: Literal["off", "auto"] = setting("off", "auto: go on from this run's newest checkpoint, if it has one")
    deterministic: bool = setting(False, "equal bits in every run on a GPU too (a CPU always does)")
    shard_optimizer: bool = setting(False, "ZeRO-1: each worker keeps and updates a share of masters and moments")
    reduce_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "dtype gradients are summed over workers in; auto: at least float32"
    )
    reduce_bucket_mb: int = setting(
        50, "MiB of gradients summed over workers at a time, at most 1/8 of all", at_least=1
    )
    reduce_by: Literal["auto", "collectives", "copies"] = setting(
        "auto", "copies: GPUs of a host fetch each other's; auto: if they can"
    )
    worker_timeout: float = setting(300.0, "seconds without progress of a worker that end the job", above=0)
    distill: DistillConfig = field(default_factory=DistillConfig)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: str = setting("adamw", "a file in apps/training/optimizers; short: optimizer=NAME")
    moments_dtype: AutoDtype = setting("auto", "dtype of the optimizer's state; auto: at least float32")
    master_weights: Literal["auto", "none", "float32", "split", "stochastic"] = setting(
        "auto", "wider copy; auto: float32 for bfloat16; stochastic: random rounding"
    )
    groups: list[dict[str, Any]] = setting(
        factory=list, help="first match wins: [{match: '*norm*', optimizer: NAME, KEY: VALUE}]"
    )
    settings: Any = plugin("apps.training.optimizers")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = setting("linear", "a file in apps/training/schedules; short: schedule=NAME")
    settings: Any = plugin("apps.training.schedules")


@dataclass(frozen=True, kw_only=True)
class MlirConfig:
    dialect: Literal["linalg", "stablehlo", "tosa", "torch"] = setting("linalg", "dialect of the modules")
    compiler: str = setting("auto", "none, iree or package.module:Class; auto: iree if it can")
    whole_step: bool = setting(False, "one module of the whole step too: forward, backward, update")
    timeout_s: float = setting(600.0, "seconds that lowering one module may take", above=0)
    memory_gb: float = setting(16.0, "GiB of memory that lowering one module may take", above=0)


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    output_dir: str = setting("outputs/artifacts", "where artifacts are written, and where run looks for one")
    arch: Literal["auto", "cpu", "cuda"] = setting("auto", "device to compile for; auto: cuda where there is a GPU")
    target: Literal["inductor", "eager", "mlir"] = setting(
        "inductor", "eager: plain autograd, no artifact; mlir: for any compiler"
    )
    verbose: bool = setting(False, "print each region's graph size, saved activations, kernels, seconds")
    debug: bool = setting(False, "keep the graphs and the generated code in a folder")
    activations: Literal["auto", "all", "dear"] = setting(
        "auto", "kept for the backward; dear: no elementwise results; auto: by memory"
    )
    head_chunks: int | None = setting(None, "pieces the loss is computed in; null: chosen from the sizes", at_least=1)
    workers: int | None = setting(None, "regions compiled at a time; null: one a core, on a GPU at most 8", at_least=1)
    mlir: MlirConfig = field(default_factory=MlirConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    artifact: str | None = setting(None, "artifact to run; null: the one in compile.output_dir that fits")
    cuda_graph: Literal["auto", "on", "off"] = setting("auto", "replay the step as one CUDA graph")
    num_threads: int | None = setting(None, "CPU threads; null: one for each core", at_least=1)
    recompute: Literal["auto", "none", "block"] = setting(
        "auto", "blocks to compute again: all, none, or what memory asks for"
    )
    memory_gib: float | None = setting(None, "GiB a worker may take; null: what its device has free", above=0)
    peak_flops: float | None = setting(None, "a worker's peak in FLOP/s, for MFU; null: known cards' own", above=0)


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    default: str | dict[str, Any] = setting(
        "dense", "for layers no rule names: NAME, package.module:Class or {use: NAME}"
    )
    rules: list[dict[str, Any]] = setting(
        factory=list, help="first match wins: [{match: '*.mlp.*', use: dense, OPTION: VALUE}]"
    )
    # Given, it is replaced by what it says: see config_rules.py.
    rules_file: str | None = setting(None, "YAML or TOML file, or a shipped one (optical, fp8); stored as rules")
    calibrate_steps: int = setting(
        0,
        "forward passes on the first rows that fill backends' ranges",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r: int = setting(0, "rank of updates B A of frozen weights; 0: train the weights", at_least=0)
    alpha: float = setting(32.0, "the updates are scaled by alpha / r", above=0)
    match: list[str] | None = setting(None, "layers: names (q_proj) and globs; null: every linear of the blocks")
    train_norms: bool = setting(False, "train the norms too")
    adapter: str | None = setting(None, "start from a folder in PEFT's format; r, alpha and layers are its own")
    merge: bool = setting(True, "write the model with its updates merged, not the adapter alone")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every: int = setting(1, "print a line every so many steps", at_least=1)
    progress: Literal["auto", "on", "off"] = setting("auto", "live progress line; auto: on a terminal")
    sample_prompt: str | None = setting(None, "text the report continues with the trained model")
    report_to: list[str] = setting(factory=list, help="loggers, any number: [csv, tensorboard, wandb, mlflow]")
    project: str = setting("substrate", "the loggers' project, or experiment")
    name: str | None = setting(None, "the loggers' name of the run; null: the output folder's")
    run_id: str | None = setting(None, "the loggers' id of the run; null: chosen, in run_id.txt")
    tags: list[str] = setting(factory=list, help="the loggers' tags of the run: [TAG, …]")
    offline: bool = setting(False, "loggers write to OUTPUT_DIR and reach for no server")
    stats_every: int | None = setting(None, "statistics of every so many steps; to csv, if to nobody", at_least=1)
    stats_by: Literal["part", "group", "parameter"] = setting("part", "statistics of blocks, optimizer groups, each")
    records_per_second: float = setting(10.0, "at most so many records a second to the loggers", above=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Compile a model's train step into an artifact, or train from one."""

    command: Literal["compile", "run"] = setting(help="compile writes an artifact, run trains from it")
    model: ModelConfig = field(default_factory=ModelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    run: RunConfig = field(default_factory=RunConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    extra: dict[str, Any] = field(default_factory=dict, metadata={"free": True})  # +new.key=value, nested by the dots

    @property
    def precision(self) -> PrecisionPolicy:
        """The dtype of everything, every `auto` filled in."""
        return resolve(
            self.model.dtype,
            compute=self.model.compute_dtype,
            norms=self.model.norm_dtype,
            residual=self.model.residual_dtype,
            logits=self.model.logits_dtype,
            moments=self.optimizer.moments_dtype,
            master=self.optimizer.master_weights,
        )
