"""Will the run fit? An estimate made before anything is allocated, against what the device has free."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from backends.errors import UserError
from backends.precision import BITS, PrecisionPolicy

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a training run holds at its peak, by what they are for."""

    parameters: int
    masters: int
    moments: int
    gradients: int
    activations: int
    snapshot: int = 0  # of a checkpoint that is being written
    statistics: int = 0  # the last gradient and the last update
    teacher: int = 0  # its weights
    recomputed: int = field(default=0, kw_only=True)  # no bytes: blocks whose activations are computed again

    @property
    def total(self) -> int:
        return sum(self._bytes().values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gibibytes(value)}" for name, value in self._bytes().items() if value)
        again = f"; of {self.recomputed} blocks computed again" if self.recomputed else ""
        return f"{gibibytes(self.total)} ({parts}{again})"

    def _bytes(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "recomputed"}


def estimate(
    num_parameters: int,
    precision: PrecisionPolicy,
    *,
    state_tensors: float,
    activations: int,
    wide_gradients: bool,
    num_trained: int | None = None,
) -> MemoryEstimate:
    """The peak of a run that holds `activations` bytes between forward and backward.

    `num_trained`: how many of the parameters have a gradient and optimizer state (None: all).
    `state_tensors`: numbers of optimizer state for each trained parameter. `wide_gradients`: they are summed in at
    least float32 (over microbatches, or for masters) rather than kept in the parameters' dtype.
    """
    width = {name: BITS[dtype] // 8 for name, dtype in asdict(precision).items() if dtype in BITS}
    gradient = max(width["parameters"], 4) if wide_gradients else width["parameters"]
    trained = num_parameters if num_trained is None else num_trained
    return MemoryEstimate(
        parameters=num_parameters * width["parameters"],
        masters=trained * precision.master_bits // 8,
        moments=round(trained * width["moments"] * state_tensors),
        gradients=trained * gradient,
        activations=activations,
    )


def compiled_estimate(
    manifest: Mapping[str, Any], precision: PrecisionPolicy, *, several_microbatches: bool, recomputed: int = 0
) -> MemoryEstimate:
    """The peak of a run of the artifact with this manifest; gradients summed over `several_microbatches` are wider.

    `recomputed`: of so many blocks only the input is kept; one of them at a time is computed again.
    """
    cost = manifest["cost"]
    saved = cost["saved_bytes"]
    activations = cost["hidden_bytes"] * (len(saved) + 1) + sum(saved[recomputed:]) + max(saved[:recomputed], default=0)
    needed = estimate(
        manifest["parameters"],
        precision,
        state_tensors=manifest["optimizer"]["state_elements"] / max(manifest["trained_parameters"], 1),
        activations=activations + cost["head_bytes"],
        wide_gradients=several_microbatches,
        num_trained=manifest["trained_parameters"],
    )
    return replace(needed, teacher=manifest["teacher_bytes"], recomputed=recomputed)


def of_one_worker(whole: MemoryEstimate, num_trained: int, world_size: int, *, shards: bool) -> MemoryEstimate:
    """What one of several workers holds: gradients are summed in at least float32; ZeRO-1 shares masters and moments.

    `num_trained`: parameters that have gradients. Shares are whole blocks: the largest is at least 1 / `world_size`.
    """
    if world_size == 1:
        return whole
    part = world_size if shards else 1
    return replace(
        whole,
        masters=whole.masters // part,
        moments=whole.moments // part,
        gradients=max(whole.gradients, num_trained * 4),
    )


def with_statistics(needed: MemoryEstimate, precision: PrecisionPolicy, num_trained: int) -> MemoryEstimate:
    """`needed` by one worker that updates `num_trained` parameters and keeps their last gradients and updates."""
    widest = max(BITS[precision.parameters], BITS[precision.master] if precision.master != "none" else 0, 32)
    return replace(needed, statistics=2 * num_trained * widest // 8)


def with_snapshot(
    needed: MemoryEstimate, world_size: int, *, shards: bool, saved_weights: int | None = None
) -> MemoryEstimate:
    """`needed` and a copy of what this worker saves: its share of the weights and of the optimizer's state.

    `saved_weights`: bytes of the weights that are saved (None: of all parameters).
    """
    state = needed.masters + needed.moments + needed.statistics
    weights = needed.parameters if saved_weights is None else saved_weights
    return replace(needed, snapshot=weights // world_size + (state if shards else state // world_size))


def eager_activations(model_config: Any, precision: PrecisionPolicy, *, batch_size: int, seq_length: int) -> int:
    """Bytes plain autograd keeps for the backward pass of a Llama-like model, plus the logits' working set.

    Per token a block keeps about 10 hidden vectors (both norms' inputs and outputs, the attention output, the residual
    stream), 4 of the heads' width (queries before and after rotation, keys and values spread over the query heads) and
    4 of the MLP's; the loss holds the logits, their float copy, the log-softmax and its gradient.
    """
    heads = model_config.num_attention_heads * model_config.head_dim
    per_block = 10 * model_config.hidden_size + 4 * heads + 4 * model_config.intermediate_size
    compute, residual, logits = (BITS[name] // 8 for name in (precision.compute, precision.residual, precision.logits))
    blocks = model_config.num_hidden_layers * per_block * max(compute, residual)
    head = model_config.vocab_size * (compute + 3 * logits)
    return batch_size * seq_length * (blocks + head)


def require_memory(needed: MemoryEstimate, available: int, device: str) -> None:
    """UserError when `needed` is more than the `available` bytes of `device`; it says what to lower first."""
    if needed.total <= available:
        return
    if needed.activations > available - (needed.total - needed.activations) > 0:
        fix = "Lower training.batch_size (and raise training.gradient_accumulation_steps) or model.max_seq_length"
    else:
        fix = "Choose a smaller model, or model.dtype=bfloat16 with optimizer.master_weights=none"
    raise UserError(
        f"Not enough memory for this run: it needs about {needed}, but {device} has {gibibytes(available)} free. {fix}."
    )


def available_memory(device: str, local_world_size: int = 1, at_most_gib: float | None = None) -> int:
    """Free bytes of "cpu" (what this process may still take, containers and limits included) or of a CUDA device.

    Of a CPU, an equal share for each of the host's workers. `at_most_gib`: no more than that, if given.
    """
    if device.startswith("cuda"):
        import torch

        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = min(min(_host_memory(), _cgroup_memory()) / local_world_size, _address_space())
    return int(min(free, math.inf if at_most_gib is None else at_most_gib * GIB))


def gibibytes(count: float) -> str:
    """`1.5 GiB`, `12.0 MiB`."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def _host_memory(path: Path = Path("/proc/meminfo")) -> float:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _cgroup_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """What the tightest control group above this process leaves, counting droppable page cache as free (v2 and v1)."""
    left = math.inf
    for folder, limit_name, usage_name, cache_name in _cgroups(root, membership):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            counters = dict(line.split() for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
            left = min(left, limit - usage + int(counters.get(cache_name, 0)))
    return max(left, 0)


def _cgroups(root: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The process's control groups from its own up to the root, with the names of their files."""
    for line in _lines(membership):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = Path(path.lstrip("/"))
        for relative in (group, *group.parents):
            yield base / relative, *names


def _address_space() -> float:
    """What `ulimit -v` leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    pages = (_lines(Path("/proc/self/statm")) or ["0"])[0].split()[0]
    return max(limit - int(pages) * resource.getpagesize(), 0)


def _number(path: Path) -> int | None:
    text = (_lines(path) or [""])[0]
    return int(text) if text.isdigit() else None  # "max": no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
