"""The command line of an experiment: argument parsing and error reporting."""

import errno
import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from examples.training.checks import InputError
from examples.training.config import TrainConfig
from examples.training.experiment import Experiment

_OPTIONS = (tyro.conf.OmitArgPrefixes,)


def main(
    program: str,
    experiment: Experiment[Any],
    commands: Mapping[str, Callable[..., Any]],
    args: Sequence[str] | None = None,
) -> Any:
    """Run the command named by the first argument.

    A command with a parameter ``config`` takes the settings of a run as options, whose
    defaults come from ``--preset``, ``--model`` or ``--config-file``. An ``InputError``
    exits the program with its message and no traceback.

    Args:
        program: how the program is invoked, such as "python -m examples.llama".
        experiment: the experiment whose settings the commands take.
        commands: functions by command name.
        args: the arguments; defaults to those of the command line.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] not in commands:
        asked = bool(args) and args[0] in ("-h", "--help")
        print(_overview(program, commands), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    return run_command(commands[args[0]], args[1:], f"{program} {args[0]}", experiment)


def run_command(
    function: Callable[..., Any],
    args: Sequence[str],
    prog: str,
    experiment: Experiment[Any],
) -> Any:
    """Call a function with command-line arguments."""

    def run() -> Any:
        command = _with_start(function, args, prog, experiment)
        return tyro.cli(command, args=args, prog=prog, config=_OPTIONS)

    return or_exit(run)


def _with_start(
    function: Callable[..., Any],
    args: Sequence[str],
    prog: str,
    experiment: Experiment[Any],
) -> Callable[..., Any]:
    """Add --preset, --model and --config-file to a command and apply them."""
    signature = inspect.signature(function)
    if "config" not in signature.parameters:
        return function
    start: Any = experiment.start
    started, _ = tyro.cli(
        start,
        args=[arg for arg in args if arg not in ("-h", "--help")],
        prog=prog,
        config=_OPTIONS,
        return_unknown_args=True,
    )
    config = experiment.starting_config(started)
    kind = TrainConfig[experiment.task]  # type: ignore[name-defined]

    def command(*, start: Any, **arguments: Any) -> Any:
        return function(**arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        p.replace(kind=keyword)
        if p.name != "config"
        else p.replace(kind=keyword, annotation=kind, default=config)
        for p in signature.parameters.values()
    ]
    first = inspect.Parameter("start", keyword, annotation=start, default=started)
    parameters.insert(-1, first)
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    return command


def _overview(program: str, commands: Mapping[str, Callable[..., Any]]) -> str:
    width = max(map(len, commands))
    lines = [
        f"  {name:{width}}  {(inspect.getdoc(function) or '').splitlines()[0]}"
        for name, function in commands.items()
    ]
    return "\n".join(
        [
            f"usage: {program} COMMAND [options]",
            "",
            *lines,
            "",
            f"Run '{program} COMMAND --help' for the options of a command.",
        ]
    )


def or_exit(run: Callable[[], Any]) -> Any:
    """Run a program, and report errors of its user in one line, without a traceback."""
    threading.excepthook = _silence_full_disk(threading.excepthook)
    try:
        return run()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_disk_full(error):
            raise
        sys.exit(
            "error: no space left on the disk; free some space and run the same "
            f"command again ({error})."
        )


def _silence_full_disk(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make an exception hook ignore full disks, which the program reports once."""

    def quiet(args: Any) -> None:
        if not _is_disk_full(args.exc_value):
            hook(args)

    return quiet


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is a full disk."""
    if error is None:
        return False
    # tensorstore's errors have no errno.
    number = error.errno if isinstance(error, OSError) else None
    return (
        number in (errno.ENOSPC, errno.EDQUOT)
        or os.strerror(errno.ENOSPC) in str(error)
        or _is_disk_full(error.__cause__ or error.__context__)
    )
