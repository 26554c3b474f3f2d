"""The command line of an experiment: its commands, and where settings start from."""

import errno
import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from examples.training.checks import InputError
from examples.training.config import TrainConfig, from_json
from examples.training.task import Task

_OPTIONS = (tyro.conf.OmitArgPrefixes,)

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Experiment(Generic[T]):
    """A task, and where its settings start from."""

    task: type[T]
    presets: Mapping[str, TrainConfig[T]]
    """Settings by name; the first is the default."""
    preset_help: str
    """What each preset is."""
    models: Mapping[str, Any]
    """Architectures by name."""
    with_model: Callable[[TrainConfig[T], str], TrainConfig[T]]
    """Sets the architecture of that name, and what goes with it."""

    @property
    def start(self) -> Any:
        """The options from which all settings start, as a dataclass for tyro."""
        default = next(iter(self.presets))
        preset = tyro.extras.literal_type_from_choices(self.presets)
        model: Any = tyro.extras.literal_type_from_choices(self.models)
        options = [
            ("preset", preset, self.preset_help, default),
            ("model", model | None, "Not given: that of the preset.", None),
            (
                "config_file",
                Path | None,
                "The config.json of an earlier run, in place of a preset.",
                None,
            ),
        ]
        return make_dataclass(
            "Start",
            [
                (name, Annotated[kind, tyro.conf.arg(help=text)], value)
                for name, kind, text, value in options
            ],
            namespace={
                "__doc__": "Where the settings start from; every other option then "
                "changes one of them."
            },
            frozen=True,
        )

    def starting_config(self, start: Any) -> TrainConfig[T]:
        """Makes the settings that hold where no other option changes them."""
        config = self.presets[start.preset]
        if start.config_file is not None:
            try:
                text = start.config_file.read_text("utf-8")
            except OSError as error:
                raise InputError(
                    f"config_file: cannot read {start.config_file} ({error.strerror})"
                ) from error
            config = from_json(text, str(start.config_file), self.task)
        return config if start.model is None else self.with_model(config, start.model)


def main(
    program: str,
    experiment: Experiment[Any],
    commands: Mapping[str, Callable[..., Any]],
    args: Sequence[str] | None = None,
) -> Any:
    """Runs the command that the first argument names.

    A command with a parameter ``config`` takes the settings of a run as options, and
    their defaults from ``--preset``, ``--model`` or ``--config-file``. An
    ``InputError`` ends the program with its message alone.

    Args:
        program: how the program is started, such as "python -m examples.llama".
        experiment: what the settings are of.
        commands: functions by the names of the commands.
        args: the arguments; those of the command line unless given.
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
    """Calls a function with the arguments of a command line."""

    def run() -> Any:
        command = _with_start(function, args, prog, experiment)
        return tyro.cli(command, args=args, prog=prog, config=_OPTIONS)

    return _or_exit(run)


def _with_start(
    function: Callable[..., Any],
    args: Sequence[str],
    prog: str,
    experiment: Experiment[Any],
) -> Callable[..., Any]:
    """Gives a command the options from which its settings start, and their values."""
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
            f"{program} COMMAND --help explains the options of one.",
        ]
    )


def _or_exit(run: Callable[[], Any]) -> Any:
    threading.excepthook = _quiet_about_a_full_disk(threading.excepthook)
    try:
        return run()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_of_a_full_disk(error):
            raise
        sys.exit(
            "error: there is no space left on the disk; make room, and give the same "
            f"command again ({error})"
        )


def _quiet_about_a_full_disk(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Leaves it to the program's end to say what a library's thread has met."""

    def quiet(args: Any) -> None:
        if not _is_of_a_full_disk(args.exc_value):
            hook(args)

    return quiet


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """Looks for the error behind the error; tensorstore's has no number, but a text."""
    if error is None:
        return False
    number = error.errno if isinstance(error, OSError) else None
    return (
        number in (errno.ENOSPC, errno.EDQUOT)
        or os.strerror(errno.ENOSPC) in str(error)
        or _is_of_a_full_disk(error.__cause__ or error.__context__)
    )
