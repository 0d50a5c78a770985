"""What in a compressed layer helps its short training: variants of svd_llm and mimic on the same rows, seed by seed.

    python benchmarks/low_rank_seeds.py model=outputs/low-rank-study/dense \
        dataset=outputs/low-rank-study/dataset length=128 tokens=16384 tune=40 keeps=0.8,0.6,0.4 seeds=7,8,9

One process compresses a dense model by each of `variants` at each of `keeps` (uniform) and trains each for `tune` steps
of `batch` rows with torch's AdamW (matrices decayed by 0.1, clipped to 1) along low_rank_rates.py's schedule, once
for each of `seeds`, which order the rows. A line for each: held-out perplexity before, the mean after, and the mean and
standard deviation over the seeds of its difference to the first variant, on the same rows.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from apps.training.cli import run_main  # noqa: E402
from benchmarks.low_rank_training import calibration_of, compressed, open_both, perplexity, tuned  # noqa: E402
from benchmarks.own_settings import own_settings  # noqa: E402
from modelzoo.compression import METHODS, Factors, Moments, compress  # noqa: E402
from modelzoo.compression.methods import balanced, principal_outputs  # noqa: E402

OWN = {
    "model": "",
    "dataset": "",
    "length": "256",
    "tokens": "16384",
    "batch": "8",
    "tune": "40",
    "tune_lr": "3e-4",
    "keeps": "0.8,0.6,0.4",
    "seeds": "7,8,9",
    "variants": "svd_llm,mimic,mimic_dense",
}


def with_a_zero_bias(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    """svd_llm and a bias to train, which is 0 at first."""
    factors = compress("svd_llm", weight, bias, moments, rank)
    zero = weight.new_zeros(len(weight)) if factors.bias is None else factors.bias
    return Factors(factors.weight_in, factors.weight_out, zero, factors.spectrum)


def with_the_best_bias(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    """svd_llm's directions with the bias that is best for them."""
    directions, spectrum = principal_outputs(weight, moments.uncentred, rank)
    mean = weight @ moments.mean
    offset = mean - directions @ (directions.t() @ mean)
    return balanced(directions.t() @ weight, directions, offset if bias is None else bias + offset, spectrum)


def without_bias(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    """mimic's directions without its bias."""
    directions, spectrum = principal_outputs(weight, moments.covariance, rank)
    return balanced(directions.t() @ weight, directions, bias, spectrum)


def orthonormal(method: str) -> Callable[[Tensor, Tensor | None, Moments, int], Factors]:
    """All of the scale in weight_in, none in weight_out."""

    def factors(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
        found = compress(method, weight, bias, moments, rank)
        out, mixed = torch.linalg.qr(found.weight_out)
        return Factors(mixed @ found.weight_in, out, found.bias, found.spectrum)

    return factors


def singular(method: str) -> Callable[[Tensor, Tensor | None, Moments, int], Factors]:
    """The singular vectors of Ŵ, the roots of its singular values in each factor."""

    def factors(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
        found = compress(method, weight, bias, moments, rank)
        out, mixed = torch.linalg.qr(found.weight_out)
        left, values, right = torch.linalg.svd(mixed @ found.weight_in, full_matrices=False)
        return Factors(
            values.sqrt()[:, None] * right, out @ left[:, : len(values)] * values.sqrt(), found.bias, found.spectrum
        )

    return factors


VARIANTS = {
    "svd_llm_zero_bias": with_a_zero_bias,
    "svd_llm_best_bias": with_the_best_bias,
    "mimic_no_bias": without_bias,
    **{f"{method}_orthonormal": orthonormal(method) for method in ("svd_llm", "mimic")},
    **{f"{method}_singular": singular(method) for method in ("svd_llm", "mimic")},
}


def program(argv: Sequence[str]) -> None:
    own = own_settings(OWN, argv)
    METHODS.update(VARIANTS)
    dense, dataset = open_both(own)
    calibration, batch = calibration_of(dense, dataset, own), int(own["batch"])
    print(f"dense {perplexity(dense, dataset, batch):.3f}", flush=True)
    for keep in own["keeps"].split(","):
        first: list[float] = []
        for variant in own["variants"].split(","):
            model = compressed(dense, calibration, variant.removesuffix("_frozen"), float(keep))
            given = {"peak": float(own["tune_lr"]), "freezes_biases": variant.endswith("_frozen")}
            after = [tuned(model, dataset, own, int(seed), **given) for seed in own["seeds"].split(",")]
            first = first or after
            paired = [one - other for one, other in zip(after, first, strict=True)]
            spread = statistics.stdev(paired) if len(paired) > 1 else 0.0
            print(
                f"keep {keep} {variant:20s} before {perplexity(model, dataset, batch):.3f}, after "
                f"{statistics.mean(after):.3f}, against the first {statistics.mean(paired):+.3f} ± {spread:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(run_main(program))
