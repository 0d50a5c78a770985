"""Which worker this process is, by what launchers put into the environment."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.workers.launch import VARIABLES, Launch, find_launch, own_gpu, slurm_address
from backends.errors import UserError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [("torchrun", TORCHRUN | MASTER), ("openmpi", OPENMPI), ("mpich", MPICH), ("slurm", SLURM)],
)
def test_each_launcher_is_recognised(launcher: str, environ: dict[str, str]) -> None:
    assert find_launch(environ) == Launch(3, 4, 1, 2, launcher)
    assert find_launch({"PATH": "/bin", **environ}) == find_launch(environ)


def test_without_a_launcher_there_is_one_worker() -> None:
    assert find_launch({"PATH": "/bin"}) == Launch(0, 1, 0, 1, "none")


def test_a_batch_script_without_srun_is_one_worker() -> None:
    assert find_launch({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == Launch()


@pytest.mark.parametrize("inner", [OPENMPI, MPICH])
def test_mpirun_inside_a_slurm_step_counts_before_it(inner: dict[str, str]) -> None:
    outer = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert find_launch(outer | inner).rank == 3


def test_torchrun_started_by_srun_on_each_host_counts_before_it() -> None:
    outer = SLURM | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert find_launch(outer | TORCHRUN | MASTER | {"TORCHELASTIC_RUN_ID": "none"}).launcher == "torchrun"


def test_rank_and_world_size_that_mpirun_contradicts_are_refused() -> None:
    with pytest.raises(UserError, match="RANK=0 WORLD_SIZE=4 contradict PMI_RANK=3 PMI_SIZE=4"):
        find_launch(TORCHRUN | MASTER | MPICH | {"RANK": "0"})
    assert find_launch(TORCHRUN | MASTER | MPICH).rank == 3  # copied from mpirun's: fine


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 without OMPI_COMM_WORLD_RANK"),
        (MPICH | {"PMI_RANK": "4"}, "PMI_RANK=4 with PMI_SIZE=4"),
        (MPICH | {"PMI_RANK": "-1"}, "PMI_RANK=-1 with PMI_SIZE=4"),
        (MPICH | {"PMI_RANK": "one"}, "PMI_RANK=one in the environment"),
        (MPICH | {"MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID=2 with MPI_LOCALNRANKS=2"),
        (MPICH | {"MPI_LOCALNRANKS": "5"}, "MPI_LOCALNRANKS=5"),
        (TORCHRUN, "without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_what_makes_no_sense_is_one_line(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        find_launch(environ)
    assert "\n" not in str(caught.value)


@given(
    launcher=st.sampled_from([name for name in VARIABLES if name != "slurm"]),
    values=st.lists(st.one_of(st.none(), st.integers(-1, 5).map(str), st.just("x")), min_size=4, max_size=4),
)
def test_whatever_is_set_the_launch_makes_sense_or_is_refused(launcher: str, values: list[str | None]) -> None:
    environ = {name: value for name, value in zip(VARIABLES[launcher], values, strict=True) if value is not None}
    try:
        launch = find_launch(environ | MASTER)
    except UserError:
        return
    assert 0 <= launch.rank < launch.world_size
    assert 0 <= launch.local_rank < launch.local_world_size <= launch.world_size


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[3,5]-ib,login1", "gpu3-ib"),
        ("login1,gpu[1-2]", "login1"),
    ],
)
def test_a_slurm_step_meets_on_its_first_host(nodes: str, host: str) -> None:
    first, port = slurm_address({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"})
    assert first == host
    assert 20_000 <= port < 30_000


def test_two_steps_of_a_job_meet_apart() -> None:
    ports = {slurm_address({"SLURM_JOB_ID": "9", "SLURM_STEP_ID": str(step)})[1] for step in range(8)}
    assert len(ports) == 8


@pytest.mark.parametrize(
    ("visible", "local", "expected"),
    [
        (None, (1, 2), "1,0"),
        (None, (1, 4), "1,0,2,3"),
        ("2,5", (1, 2), "5,2"),
        ("2,5,7", (1, 2), "5,2"),
        ("GPU-8f,GPU-1a", (0, 2), "GPU-8f,GPU-1a"),
        ("3", (1, 2), "3"),  # the launcher gave each worker one
        (None, (0, 1), None),
        ("2,5", (0, 1), "2,5"),
    ],
)
def test_each_worker_of_a_host_sees_its_own_gpu_first(
    visible: str | None, local: tuple[int, int], expected: str | None
) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    own_gpu(Launch(rank=local[0], world_size=2, local_rank=local[0], local_world_size=local[1]), environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="has 2 GPUs for 3 workers"):
        own_gpu(Launch(rank=2, world_size=3, local_rank=2, local_world_size=3), {"CUDA_VISIBLE_DEVICES": "0,1"})
