"""LoRA adapters in PEFT's folder format: adapter_config.json and adapter_model.safetensors.

Tensors are called `base_model.model.LAYER.lora_A.weight` [r, in] and `….lora_B.weight` [out, r], LAYER as in the plain
Hugging Face model; what else was trained (norms) stands under its own name behind the same prefix.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backends.errors import UserError
from backends.lora import lora_layers, trained_parameters
from modelzoo.checkpoint_files import StoredTensor, open_file
from modelzoo.checkpoint_writing import written_beside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Each of these, when it is on, makes another computation than W + alpha/r · B A.
_OTHER_COMPUTATIONS = (
    "use_rslora use_dora use_qalora use_bdlora fan_in_fan_out bias lora_bias layer_replication rank_pattern "
    "alpha_pattern target_parameters trainable_token_indices alora_invocation_tokens arrow_config kappa_tuner_config"
).split()
_OFF: tuple[Any, ...] = (None, False, "none", [], {})
# Ways to choose the first A and B that leave the base model's weights alone; others subtract from them.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Adapter:
    """What a folder holds: `stored` by our parameters' names; `others`: trained parameters that are no A or B."""

    folder: Path
    r: int
    alpha: float
    layers: tuple[str, ...]
    others: tuple[str, ...]
    stored: dict[str, StoredTensor]

    def read(self) -> dict[str, Tensor]:
        """Every tensor, by our parameter's name."""
        return {name: tensor.read() for name, tensor in self.stored.items()}


def open_adapter(folder: str | Path) -> Adapter:
    """Read an adapter's config and its tensors' headers. UserError for anything but plain LoRA, and damaged files."""
    path = Path(folder).expanduser()
    config = _read_config(path)
    if not (path / WEIGHTS).is_file():
        raise UserError(f"The adapter '{folder}' has no {WEIGHTS}. Expected a folder in PEFT's format.")
    stored = {}
    for name, tensor in open_file(path / WEIGHTS).items():
        ours = name.removeprefix(PREFIX)
        for factor in ("lora_A", "lora_B"):
            ours = ours.replace(f".{factor}.weight", f".{factor}")
        stored[ours] = tensor
    factors = {name for name in stored if name.endswith((".lora_A", ".lora_B"))}
    layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in stored if name in factors))
    adapter = Adapter(
        path, config["r"], float(config["lora_alpha"]), layers, tuple(sorted(stored.keys() - factors)), stored
    )
    _check_shapes(adapter)
    return adapter


def save_adapter(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Write what `model` trains beside its frozen weights as PEFT reads it; `base` names the model they belong to.

    The folder is complete or not there; other files in it stay. Raises UserError when it cannot be written.
    """
    layers, trained = lora_layers(model), trained_parameters(model)
    assert layers, "a model without updates has no adapter"
    ranks = {(layer.lora_A.shape[0], layer.lora_alpha) for layer in layers.values()}
    ((r, alpha),) = ranks
    factors = {f"{name}.{factor}" for name in layers for factor in ("lora_A", "lora_B")}
    others = [name.rpartition(".")[0] for name in trained if name not in factors]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _short_names(layers, model, nn.Linear),
        "modules_to_save": _short_names(others, model, nn.Module) if others else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {
        PREFIX + (f"{name}.weight" if name in factors else name): tensor.detach().cpu().contiguous()
        for name, tensor in trained.items()
    }
    with written_beside(folder, "adapter") as new:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / WEIGHTS).chmod((new / CONFIG).stat().st_mode)  # safetensors lets nobody else read its files
    return Path(folder).expanduser().resolve()


def _short_names(names: Iterable[str], model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """The last parts of the names where they mean exactly these modules (`q_proj`), else the full names."""
    wanted = set(names)
    ends = {name.rpartition(".")[2] for name in wanted}
    meant = {name for name, part in model.named_modules() if isinstance(part, kind) and name.rpartition(".")[2] in ends}
    return sorted(ends if meant == wanted else wanted)


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, checked to be of plain LoRA."""
    if not folder.is_dir():
        raise UserError(f"There is no adapter folder '{folder}'. Expected one with {CONFIG} and {WEIGHTS}.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        inside = f" Did you mean '{folder / 'adapter'}'?" if (folder / "adapter" / CONFIG).is_file() else ""
        raise UserError(
            f"Cannot read '{folder / CONFIG}' ({type(error).__name__}). "
            f"Expected an adapter folder in PEFT's format.{inside}"
        ) from error
    if kind != "LORA":
        raise UserError(f"The adapter '{folder}' is of peft_type {kind}. Expected LORA.")
    for name in _OTHER_COMPUTATIONS:
        if config.get(name) not in _OFF:
            raise UserError(
                f"The adapter '{folder}' has {name}={config[name]!r}, which is not computed here. Expected plain LoRA, "
                "W + alpha/r · B A: merge the adapter with PEFT and start from the merged model."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        raise UserError(
            f"The adapter '{folder}' has init_lora_weights={start!r}, which changes the base model's weights. Merge "
            "the adapter with PEFT and start from the merged model."
        )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        raise UserError(f"The adapter '{folder}' has r={r!r} and lora_alpha={alpha!r}. Expected a rank and a number.")
    return config


def _check_shapes(adapter: Adapter) -> None:
    for layer in adapter.layers:
        for factor, side in (("lora_A", 0), ("lora_B", 1)):
            tensor = adapter.stored.get(f"{layer}.{factor}")
            if tensor is None:
                raise UserError(f"The adapter '{adapter.folder}' has no {factor} for {layer}. Download it again.")
            if len(tensor.shape) != 2 or tensor.shape[side] != adapter.r or not isinstance(tensor.dtype, torch.dtype):
                raise UserError(
                    f"The adapter '{adapter.folder}' has {layer}.{factor} as {tensor.dtype} {list(tensor.shape)}, and "
                    f"{CONFIG} says r={adapter.r}. Expected a matrix of that rank: the two files do not go together."
                )
    if not adapter.layers:
        raise UserError(f"The adapter '{adapter.folder}' holds no lora_A and lora_B. Expected those of some layers.")
