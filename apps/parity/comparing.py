"""One variant against the reference: calibrate, layers, held-out text, time, energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from apps.parity.batches import Batches, Tensors
from apps.parity.dev_split import compare_on
from apps.parity.energy import energy_constants, energy_per_token
from apps.parity.forward import logits_of
from apps.parity.layer_errors import accumulated_errors, local_errors
from apps.parity.powers import Error, LocalErrors
from apps.parity.results import LayerResult, VariantResult
from apps.parity.settings import CompareSettings
from apps.parity.timing import time_in_turns
from apps.parity.variants import Variant
from apps.training.progress import Progress
from backends.precision import BITS
from backends.routing import layers_of
from backends.state import Stateful


def ready(variant: Variant, weights: Any, batches: Batches, settings: CompareSettings) -> Any:
    """The variant's model, its backends' statistics taken from training-mode forwards, in evaluation mode."""
    model = variant.build(weights)
    if any(isinstance(layer, Stateful) and layer.state_specs for layer in model.modules()):
        calibration = batches.calibration()
        with Progress(len(calibration), f"{variant.name}: calibrating", "batches", mode=settings.progress) as progress:
            calibrate(model, calibration, progress)
    return model


def calibrate(model: Any, batches: Sequence[Tensors], progress: Progress) -> None:
    """Let each layer see its ranges; as in any plain loop, its state moves at the end of each forward."""
    model.train()
    for batch in batches:
        with torch.no_grad():
            logits_of(model, batch)
        progress.update()
    model.eval()


def compare(
    reference: tuple[Variant, Any], other: tuple[Variant, Any], batches: Batches, settings: CompareSettings
) -> tuple[VariantResult, VariantResult]:
    """The reference's own numbers beside `other`, and those of `other` with its errors; both models are ready."""
    (first, ours), (second, theirs) = reference, other

    def progress(total: int, what: str, unit: str = "batches") -> Progress:
        return Progress(total, f"{second.name}: {what}", unit, mode=settings.progress)

    measured, layers = batches.measured(), list(layers_of(ours))
    with progress(len(measured), "each layer alone") as shown:
        local = local_errors(ours, theirs, layers, measured, shown.update)
    with progress(len(measured), "layers in the whole model") as shown:
        accumulated = accumulated_errors(ours, theirs, layers, measured, shown.update)
    with progress(batches.num_dev, "dev split") as shown:
        held_out = compare_on(ours, theirs, batches.dev(), shown.update)
    with progress(settings.timing_rounds + 1, "timing", "rounds") as shown:
        timings = time_in_turns([ours, theirs], measured[0], rounds=settings.timing_rounds, on_round=shown.update)

    own, found = (
        VariantResult(
            name=variant.name,
            routed_table=variant.routing.table(),
            evaluation=evaluation,
            kl=None,
            timing=timing,
            energy=energy_per_token(
                model,
                variant.routing,
                batch_size=settings.batch_size,
                length=settings.model.max_seq_length,
                itemsize=BITS[settings.precision.compute] // 8,
            ),
            constants=energy_constants(variant.routing),
        )
        for (variant, model), evaluation, timing in zip(
            (reference, other), (held_out.reference, held_out.other), timings, strict=True
        )
    )
    rows = [_layer_result((first, second), name, local.get(name), accumulated.get(name)) for name in layers]
    return own, replace(found, kl=held_out.kl, layers=rows)


def _layer_result(
    variants: tuple[Variant, Variant], name: str, local: LocalErrors | None, accumulated: Error | None
) -> LayerResult:
    expected, found = (variant.routing.backend_of(name) for variant in variants)
    return LayerResult(
        layer=name,
        kind=variants[1].routing.layers[name].kind,
        backend=str(found),
        changed=found != expected,
        output=local.output if local else None,
        input_gradient=local.input_gradient if local else None,
        weight_gradient=local.weight_gradient if local else None,
        accumulated=accumulated,
    )
