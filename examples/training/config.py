"""The settings of a run: task, optimizer and training."""

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
    """The configuration of a training run."""

    task: T
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 600
    """Number of training steps."""
    accumulate: int = 1
    """Number of parts into which each batch is split, to save memory; gradients are
    accumulated over the parts and averaged."""
    log_every: int = 25
    """Steps between log writes. The log still has a line for every step."""
    eval_every: int = 25
    """Steps between evaluations on the validation data."""
    checkpoint_every: int = 100
    """Steps between checkpoints, a multiple of eval_every."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the best."""
    mesh: tuple[int, int, int] | None = None
    """Number of devices along the axes data, fsdp and tensor. Batches are split over
    data x fsdp, parameters over fsdp x tensor. Defaults to all devices on fsdp."""
    seed: int = 0
    """Seed of the initial weights and the data order."""
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Directory of another run of the same model, whose newest checkpoint provides the
    initial weights. Steps, data and optimizer state start from scratch. Some
    experiments also accept other model formats; see their documentation."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the given one, or the task's default.

        Raises:
            InputError: if there is neither.
        """
        name, given = self.optimizer.optimizer, self.optimizer.learning_rate
        rate = self.task.default_learning_rate(name) if given is None else given
        if rate is None:
            raise InputError(
                f"learning_rate: there is no default for {OPTIMIZERS[name].title} and "
                "this model; pass --learning-rate."
            )
        return rate

    def __post_init__(self) -> None:
        """Validate the settings."""
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
            f"checkpoint_every ({self.checkpoint_every}) must be a multiple of "
            f"eval_every ({self.eval_every}), because checkpoints are ranked by their "
            "validation loss.",
        )
        require(
            self.mesh is None or len(self.mesh) == 3,
            f"mesh must have three sizes, for data, fsdp and tensor, got {self.mesh}.",
        )
        for size in self.mesh or ():
            require_positive("mesh", size)
        require(
            self.task.data.batch_size % self.accumulate == 0,
            f"accumulate ({self.accumulate}) must divide batch_size "
            f"({self.task.data.batch_size}).",
        )
        require(
            0 <= self.seed < 2**32,
            f"seed must be at least 0 and below 2**32, got {self.seed}.",
        )


def settings(config: Any) -> dict[str, Any]:
    """Return all settings by name, including those of nested dataclasses."""
    return {f.name: getattr(owner, f.name) for owner, f in _fields(config)}


def identity(config: TrainConfig[Any]) -> dict[str, Any]:
    """Return the settings that must not change when a run resumes."""
    free = {"mesh", "keep", "checkpoint_every"} | config.task.free
    return {k: value for k, value in settings(config).items() if k not in free}


def with_settings(config: Any, values: dict[str, str]) -> Any:
    """Change settings, given as text, in whichever nested dataclass has them.

    Raises:
        InputError: if a name is not a setting, or a text does not fit its type.
    """
    known = settings(config)
    for name in values:
        require(name in known, f"{name} is not a setting; see --help.")
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
    """Parse a value of a type; the items of a sequence are separated by spaces."""
    is_none = text.lower() == "none"
    meanings = (None, [], text) if is_none else (text, text.split())
    adapter: Any = pydantic.TypeAdapter(kind)
    reasons = []
    for meaning in meanings:
        try:
            return adapter.validate_python(meaning)
        except pydantic.ValidationError as error:
            reasons.append(error.errors()[-1]["msg"])
    raise InputError(f"{name}: invalid value {text!r} ({reasons[0]}).")


def _fields(config: Any) -> Iterator[tuple[Any, Any]]:
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from _fields(value)
        else:
            yield config, f


def to_json(config: TrainConfig[Any]) -> str:
    """Serialize a configuration as JSON for ``from_json``."""
    kind: Any = TrainConfig[type(config.task)]  # type: ignore[misc]
    adapter = pydantic.TypeAdapter(kind)
    return adapter.dump_json(config, indent=2).decode() + "\n"


def from_json(text: str, source: str, task: type[T]) -> TrainConfig[T]:
    """Parse the output of ``to_json``. Missing settings have their defaults.

    Args:
        text: the JSON.
        source: the source of the text, for error messages.
        task: the class of the task.

    Raises:
        InputError: if the text is not a configuration, naming the source and errors.
    """
    adapter = pydantic.TypeAdapter(TrainConfig[task])  # type: ignore[valid-type]
    try:
        return adapter.validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        wrong = [
            ": ".join([*[".".join(map(str, e["loc"]))] * bool(e["loc"]), e["msg"]])
            # Pydantic's prefix of errors from __post_init__.
            .replace("Value error, ", "")
            .removesuffix(".")
            for e in error.errors()
        ]
        raise InputError(
            f"{source} is not the configuration of a run: {'; '.join(wrong)}."
        ) from error
