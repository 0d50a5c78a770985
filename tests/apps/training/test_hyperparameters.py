"""The hyper-parameter tensor: a row for each parameter, vectors without decay."""

import torch

from apps.training.hyperparameters import hyperparameter_table
from apps.training.optimizers.adamw import AdamW


def test_rows_follow_the_parameters_and_spare_norms_and_biases_from_decay() -> None:
    parameters = [torch.zeros(3, 2), torch.zeros(3), torch.zeros(2, 2)]
    config = AdamW.Config(weight_decay=0.25)
    table = hyperparameter_table(parameters, AdamW, config, step=3, lr=0.5, dtype=torch.float64)
    column = {name: table[:, i].tolist() for i, name in enumerate(AdamW.hyperparameter_names)}
    assert column["weight_decay"] == [0.25, 0.0, 0.25]
    assert column["lr"] == [0.5] * 3
    assert column["bias_correction1"] == [1 - 0.9**3] * 3
    assert table.dtype == torch.float64
