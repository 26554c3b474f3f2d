"""What an experiment hands to the command line: a task, and its presets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from examples.training.checks import read_text, require
from examples.training.config import TrainConfig, from_json
from examples.training.task import Task

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
    def _default(self) -> str:
        return next(iter(self.presets))

    @property
    def start(self) -> Any:
        """The options from which all settings start, as a dataclass for tyro."""
        preset: Any = tyro.extras.literal_type_from_choices(self.presets)
        model: Any = tyro.extras.literal_type_from_choices(self.models)
        options = [
            (
                "preset",
                preset | None,
                f"{self.preset_help} Not given: {self._default}.",
                None,
            ),
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
                "__doc__": "Where the settings start; every other option then "
                "changes one of them."
            },
            frozen=True,
        )

    def starting_config(self, start: Any) -> TrainConfig[T]:
        """Makes the settings that hold where no other option changes them."""
        if start.config_file is not None:
            require(
                start.preset is None,
                "preset: --config-file takes its place; give one of them",
            )
            text = read_text("config_file", start.config_file)
            config = from_json(text, str(start.config_file), self.task)
        else:
            config = self.presets[start.preset or self._default]
        return config if start.model is None else self.with_model(config, start.model)
