"""A Python that has imported PyTorch and transformers before it is asked to run a program.

Most of what a small run takes is imports of packages, the same ones in each process. One process of the test session
imports them and is forked for each program; modules of the project it does not know, so a program imports those itself.
A program is a process of its own, with the arguments, environment, folder, signals and exit code of whoever starts it.
What Python decides when it starts is the same for all: the hash of a string, filters of warnings. A test of these, of
imports, or of being killed starts `sys.executable`.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(folder: Path) -> "subprocess.Popen[bytes]":
    """Start the process that is forked, and write `folder/python`, which asks it to run what it is given. It imports
    nothing before it is asked, and ends when its stdin is closed."""
    address = folder / "python.socket"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a program has its own
    server = subprocess.Popen(
        [sys.executable, __file__, str(address)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches programs by who asked for them
    )
    assert server.stdout is not None
    server.stdout.readline()
    beside = {name: f'"{Path(sys.executable).with_name(name)}"' for name in ("mpirun", "torchrun")}  # looked for there
    for name, words in ({"python": f'"{sys.executable}" -IS "{__file__}" "{address}"'} | beside).items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        script.chmod(0o755)
    return server


def python() -> str:
    """What runs a program quickly: takes what `sys.executable` takes."""
    return os.environ.get("TESTS_PYTHON", sys.executable)


def ask(address: str, arguments: list[str]) -> int:
    """Have a program run as if this process were it; its exit code, negative for a signal."""
    files = [0, 1, 2, *([int(os.environ["PMI_FD"])] if "PMI_FD" in os.environ else [])]  # the last: MPICH's mpirun
    asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}
    content = json.dumps(asked).encode()
    with socket.socket(socket.AF_UNIX) as keeper:
        keeper.connect(address)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        socket.send_fds(keeper, [len(content).to_bytes(8, "little")], files)
        keeper.sendall(content)
        answers = keeper.makefile()
        program = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(program, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return int(answers.readline())


def serve(address: str) -> list[str] | None:
    """Fork for each who asks, until stdin is closed; returns a program's arguments in a fork that is to run it."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print(flush=True)
        while True:
            ready, _, _ = select.select([0, listening], [], [], 1.0)
            if 0 in ready:
                return None
            if listening in ready:
                asking, _ = listening.accept()
                import_packages()
                if os.fork() == 0:
                    listening.close()
                    return keep(asking)
                asking.close()
            while children_ended():
                pass


def children_ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def import_packages() -> None:
    """What nearly every program imports of other projects."""
    import datasets  # noqa: F401
    import region_cache  # noqa: F401  (beside this file)
    import torch._inductor.compile_fx  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    gc.freeze()  # a collection in a fork would copy all of it


def keep(asking: socket.socket) -> list[str]:
    """Fork once more: returns in the program; here, wait for its end and say it, or end it with who asked."""
    size, files, _, _ = socket.recv_fds(asking, 8, 4)
    with asking.makefile("rb") as given:
        asked = json.loads(given.read(int.from_bytes(size, "little")))
    program = os.fork()
    if program == 0:
        asking.close()
        become(asked, files)
        return list(asked["arguments"])
    asking.sendall(f"{program}\n".encode())
    for descriptor in (0, *files):  # whoever reads what a program writes waits until nobody can write
        os.close(descriptor)
    ended = os.pidfd_open(program)
    ready, _, _ = select.select([ended, asking], [], [])
    if ended not in ready:  # who asked was killed
        os.kill(program, signal.SIGKILL)
    _, status = os.waitpid(program, 0)
    with contextlib.suppress(BrokenPipeError):
        asking.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(asked: dict[str, object], files: Sequence[int]) -> None:
    """Take over what a program is given by who starts it."""
    apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in files]
    for descriptor, number in zip(apart, asked["files"], strict=True):
        os.dup2(descriptor, number)
    for descriptor in {*apart, *files} - set(asked["files"]):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.executable = python()  # for programs that it starts
    compiler = sys.modules["torch._inductor"]
    compiler.aot_compile = partial(sys.modules["region_cache"].compile_or_copy, compiler.aot_compile)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    random.seed()


def run(arguments: Sequence[str]) -> None:
    """As `python ARGUMENTS`, in this process."""
    path = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[0] == "-m":
        sys.path[:1] = [os.getcwd(), *path]
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    script = os.path.abspath(arguments[0])
    sys.path[:1] = [os.path.dirname(script), *path]
    sys.argv = list(arguments)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = script
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def outcome(arguments: Sequence[str]) -> int:
    """The exit code that Python would end with, negative for a signal."""
    try:
        run(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 255
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end_as(code: int) -> NoReturn:
    """End with an exit code, or by a signal where it is negative, as Python does, but without taking its modules apart:
    that takes a second in a fork."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if "mpi4py.MPI" in sys.modules:  # says goodbye to mpirun after all that
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    address, *asked = sys.argv[1:]
    if not asked:
        program = serve(address)
        sys.exit() if program is None else end_as(outcome(program))
    elif asked[0].startswith("-") and asked[0] != "-m":
        os.execv(sys.executable, [sys.executable, *asked])
    else:
        end_as(ask(address, asked))
