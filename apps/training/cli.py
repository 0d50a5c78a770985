"""The frame every program here starts in: a user's mistake is one line on stderr and exit code 2, never a traceback."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from apps.training.workers.launch import Launch, find_launch
from backends.errors import UserError

# What the system answers about a place that was named, wherever in the program it is first touched: never a bug.
_OF_THE_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader (`| head`) went away


class _OfFirstAlone(Exception):
    """Carries an error of the first worker that no other will come to hear of."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def first_alone(work: Callable[[], int | None]) -> int | None:
    """What `work()` gives on the first worker; the others have nothing to do, and an error waits for none of them."""
    launch = find_launch()
    if launch.world_size == 1:
        return work()
    if not launch.is_first:
        return 0
    try:
        return work()
    except BrokenPipeError:
        raise
    except Exception as error:
        raise _OfFirstAlone(error) from None


def run_main(
    program: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None, *, many_workers: bool = False
) -> int:
    """Call `program` with the command line's arguments and return its exit code (None counts as 0).

    A program's entry point is `def main() -> int: return run_main(program)`, called as `sys.exit(main())`. Of many
    workers only the first prints, and an error of any of them is said once for all. A program that is not made for
    `many_workers` runs on the first alone.
    """
    launch = Launch()
    try:
        launch = find_launch()
        if not launch.is_first:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        arguments = sys.argv[1:] if argv is None else argv
        code = program(arguments) if many_workers else first_alone(lambda: program(arguments))
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return code or 0
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain about the same pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as raised:
        error = raised.error if isinstance(raised, _OfFirstAlone) else raised
        if launch.world_size > 1 and error is raised:
            from apps.training.workers.group import fail_before_opening

            fail_before_opening(launch, error)
        line = user_line(error)
        if line is None and error is not raised:
            raise error from error.__cause__
        if line is None:
            raise
        _say(f"error: {line}")
        return 2


def _say(line: str) -> None:
    with suppress(OSError):  # nobody is left to read it: the exit code says it too
        print(line, file=sys.stderr)


def user_line(error: BaseException) -> str | None:
    """The one line for an error that is the user's to mend; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _OF_THE_PLACE and not isinstance(error, BrokenPipeError):
        where = f": '{error.filename}'" if error.filename is not None else ""
        return f"{error.strerror}{where}. Expected a place with room that you may use."
    return None
