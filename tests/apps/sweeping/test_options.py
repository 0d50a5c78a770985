"""Which settings are the sweep's and which its runs'."""

import re

import pytest

from apps.sweeping.options import read_options
from backends.errors import UserError

AXES = "sweep={optimizer.lr: [1e-4, 1e-3]}"


def test_settings_are_told_apart() -> None:
    runs = ["training.batch_size=4", "optimizer=adamw", "+own.key=1", "config=run.yaml"]
    options, given = read_options([AXES, *runs, "sweep.mode=zip", "launcher=mpirun -np 2", "stop_on_error=true"])
    assert given == runs
    assert options.sweep.axes == {"optimizer.lr": [1e-4, 1e-3]}
    assert (options.sweep.mode, options.launcher, options.stop_on_error) == ("zip", "mpirun -np 2", True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "sweep is missing"),
        ([AXES, "lancher=x"], "Unknown setting 'lancher'. Did you mean 'launcher'?"),
        ([AXES, "sweep.mode=gird"], "Expected grid|zip. Did you mean 'grid'?"),
        (["sweep=[1, 2]"], "Expected dict"),
        (["sweep={optimizer.lr: [1"], "Expected YAML"),
        ([AXES, "command=run"], "'command' cannot be given to a sweep"),
        ([AXES, "training.output_dir=x"], "each run gets a folder of its own"),
        ([AXES, "checkpoint.save_path=x"], "each run saves in its own folder"),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_options(argv)
    assert "\n" not in str(error.value)
