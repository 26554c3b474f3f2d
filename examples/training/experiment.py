"""What an experiment provides to the command line: a task and its presets."""

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
    """A task and the presets of its settings."""

    task: type[T]
    presets: Mapping[str, TrainConfig[T]]
    """Configurations by name; the first is the default."""
    preset_help: str
    """Help text on the presets."""
    models: Mapping[str, Any]
    """Architectures by name."""
    with_model: Callable[[TrainConfig[T], str], TrainConfig[T]]
    """Function that sets the named architecture, and settings that depend on it."""

    @property
    def _default(self) -> str:
        return next(iter(self.presets))

    @property
    def start(self) -> Any:
        """The options that choose the initial settings, as a dataclass for tyro."""
        preset: Any = tyro.extras.literal_type_from_choices(self.presets)
        model: Any = tyro.extras.literal_type_from_choices(self.models)
        options = [
            (
                "preset",
                preset | None,
                f"{self.preset_help} Defaults to {self._default}.",
                None,
            ),
            ("model", model | None, "Architecture. Defaults to the preset's.", None),
            (
                "config_file",
                Path | None,
                "The config.json of an earlier run, instead of a preset.",
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
                "__doc__": "The settings to start from; every other option overrides "
                "one of them."
            },
            frozen=True,
        )

    def starting_config(self, start: Any) -> TrainConfig[T]:
        """Return the settings before any other option overrides them."""
        if start.config_file is not None:
            require(
                start.preset is None,
                "preset: cannot be combined with --config-file; pass only one of them.",
            )
            text = read_text("config_file", start.config_file)
            config = from_json(text, str(start.config_file), self.task)
        else:
            config = self.presets[start.preset or self._default]
        return config if start.model is None else self.with_model(config, start.model)
