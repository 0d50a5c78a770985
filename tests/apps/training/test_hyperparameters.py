"""The hyper-parameter tensor: a row for each parameter, vectors without decay."""

import torch

from apps.training.config_schema import OptimizerConfig
from apps.training.hyperparameters import hyperparameter_table
from apps.training.optimizers.adamw import AdamW
from apps.training.parameter_groups import group_parameters


def test_rows_follow_the_parameters_and_spare_norms_and_biases_from_decay() -> None:
    config = OptimizerConfig(settings=AdamW.Config(lr=2.0, weight_decay=0.25))
    shapes = {"a": ((3, 2), "matrix"), "b": ((3,), "vector"), "c": ((2, 2), "matrix")}
    groups = group_parameters(config, shapes)
    table = hyperparameter_table(shapes, groups, step=3, rate=lambda peak: peak / 4, dtype=torch.float64)
    column = {name: table[:, i].tolist() for i, name in enumerate(AdamW.hyperparameter_names)}
    assert column["weight_decay"] == [0.25, 0.0, 0.25]
    assert column["lr"] == [0.5] * 3
    assert column["bias_correction1"] == [1 - 0.9**3] * 3
    assert table.dtype == torch.float64
