"""Low-rank compression of any model with nn.Linear layers in blocks: moments, factors, ranks. docs/low-rank.md."""

from modelzoo.compression.allocation import spectrum_ranks, uniform_ranks
from modelzoo.compression.compressing import LayerReport, compress_model
from modelzoo.compression.expanding import expand_model
from modelzoo.compression.gradient import learn_factors
from modelzoo.compression.methods import METHODS, Factors, compress, measured_error, start_of_learning
from modelzoo.compression.moments import Moments

__all__ = [
    "METHODS",
    "Factors",
    "LayerReport",
    "Moments",
    "compress",
    "compress_model",
    "expand_model",
    "learn_factors",
    "measured_error",
    "spectrum_ranks",
    "start_of_learning",
    "uniform_ranks",
]
