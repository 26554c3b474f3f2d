"""The settings of a run: a task's, an optimizer's, and the program's own."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import pydantic
import tyro

from examples.training.checks import InputError, require, require_positive
from examples.training.optimizers import OPTIMIZERS, OptimizerConfig
from examples.training.task import Task

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class TrainConfig(Generic[T]):
    """One training run."""

    task: T
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 600
    """Training steps."""
    accumulate: int = 1
    """Parts into which a batch is cut, one after the other, to save memory; the
    gradient is their mean."""
    log_every: int = 25
    """Steps between two writings of the log, which has a line for every step."""
    eval_every: int = 25
    """Steps between two measurements of the validation loss."""
    checkpoint_every: int = 100
    """Steps between two checkpoints, a multiple of eval_every."""
    keep: int = 2
    """How many of the newest checkpoints are kept, beside the best."""
    mesh: tuple[int, int, int] | None = None
    """Devices along the axes data, fsdp and tensor. Each example of a batch is on one
    device of data x fsdp; parameters are split over fsdp x tensor. Not given: all
    devices on fsdp."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Begin with the weights of another run of the same model, by its directory: those
    of its newest checkpoint. Steps, data and optimizer begin anew. Some experiments
    take models in other formats, too; their pages say which."""

    @property
    def learning_rate(self) -> float:
        """The peak of the schedule, given or the task's default.

        Raises:
            InputError: where there is neither.
        """
        name, given = self.optimizer.optimizer, self.optimizer.learning_rate
        rate = self.task.default_learning_rate(name) if given is None else given
        if rate is None:
            raise InputError(
                f"learning_rate: there is no default for {OPTIMIZERS[name].title} and "
                "this model; give one"
            )
        return rate

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in (
            "steps",
            "accumulate",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep",
        ):
            require_positive(name, getattr(self, name))
        require(
            self.checkpoint_every % self.eval_every == 0,
            f"checkpoint_every ({self.checkpoint_every}) is not a multiple of "
            f"eval_every ({self.eval_every}): a checkpoint is judged by its validation "
            "loss",
        )
        require(
            self.mesh is None or len(self.mesh) == 3,
            f"mesh is {self.mesh}: give a size for data, fsdp and tensor",
        )
        for size in self.mesh or ():
            require_positive("mesh", size)
        require(
            self.task.data.batch_size % self.accumulate == 0,
            f"accumulate ({self.accumulate}) does not divide batch_size "
            f"({self.task.data.batch_size})",
        )
        require(
            0 <= self.seed < 2**32,
            f"seed is {self.seed}: it has to be at least 0 and below 2**32",
        )


def settings(config: Any) -> dict[str, Any]:
    """Lists all settings by name, those of nested dataclasses among them."""
    return {f.name: getattr(owner, f.name) for owner, f in _fields(config)}


def identity(config: TrainConfig[Any]) -> dict[str, Any]:
    """Returns the settings that must be equal for a run to resume."""
    free = {"mesh", "keep", "checkpoint_every"} | config.task.free
    return {k: value for k, value in settings(config).items() if k not in free}


def with_settings(config: Any, values: dict[str, str]) -> Any:
    """Changes settings, given as text, whichever nested dataclass they belong to.

    Raises:
        InputError: for a name that is no setting, and a text that is not of its type.
    """
    known = settings(config)
    for name in values:
        require(name in known, f"{name}: there is no such setting; see --help")
    return _replaced(config, values)


def _replaced(config: Any, values: dict[str, str]) -> Any:
    changes: dict[str, Any] = {}
    types = get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            changes[f.name] = _replaced(value, values)
        elif f.name in values:
            changes[f.name] = _parsed(f.name, values[f.name], types[f.name])
    return replace(config, **changes)


def _parsed(name: str, text: str, kind: Any) -> Any:
    """Parses a value of a type; the items of a sequence are separated by spaces."""
    is_none = text.lower() == "none"
    adapter: Any = pydantic.TypeAdapter(kind)
    try:
        return adapter.validate_python(None if is_none else text)
    except pydantic.ValidationError as error:
        why = error.errors()[-1]["msg"]
    try:
        return adapter.validate_python([] if is_none else text.split())
    except pydantic.ValidationError as error:
        raise InputError(f"{name}: cannot be {text!r} ({why})") from error


def _fields(config: Any) -> Iterator[tuple[Any, Any]]:
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from _fields(value)
        else:
            yield config, f


def to_json(config: TrainConfig[Any]) -> str:
    """Writes a configuration so that ``from_json`` reads it back."""
    kind: Any = TrainConfig[type(config.task)]  # type: ignore[misc]
    adapter = pydantic.TypeAdapter(kind)
    return adapter.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str, source: str, task: type[T]) -> TrainConfig[T]:
    """Reads what ``to_json`` wrote. A setting that is not there has its default.

    Args:
        text: the JSON.
        source: where it comes from, for messages.
        task: the class of the task.

    Raises:
        InputError: for anything else, naming the source and what is wrong with it.
    """
    adapter = pydantic.TypeAdapter(TrainConfig[task])  # type: ignore[valid-type]
    try:
        return adapter.validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        wrong = [
            ": ".join([*[".".join(map(str, e["loc"]))] * bool(e["loc"]), e["msg"]])
            # What pydantic says before the message of a __post_init__.
            .replace("Value error, ", "")
            for e in error.errors()
        ]
        raise InputError(
            f"{source} is not the configuration of a run: {'; '.join(wrong)}"
        ) from error
