"""The questions, and the runs that answer each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.llama.config import ModelConfig
from examples.llama.task import PRESETS as LLAMA
from examples.llama.task import LlamaTask
from examples.mae.task import PRESETS as MAE
from examples.training.config import TrainConfig

TUNING_SEED = 0
"""The seed of the runs that choose the settings."""

SEEDS = (1, 2, 3, 4, 5)
"""The seeds of the runs that are compared; the tuning seed is not among them."""

Sweep = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Question:
    """Optimizers with and without caution, each tuned on a grid and then compared."""

    title: str
    config: TrainConfig[Any]
    sweeps: tuple[Sweep, ...]
    """Grids of settings. On each, the best point of each side is chosen by the tuning
    seed, and trained again with the seeds."""
    optimizers: tuple[str, ...] = ("adamw",)
    seeds: tuple[int, ...] = SEEDS


def _with_rule(config: TrainConfig[Any], **optimizer: Any) -> TrainConfig[Any]:
    """Sets the paper's Table 1: second moments over 20 steps, and decay."""
    values = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, **optimizer}
    return replace(
        config,
        optimizer=replace(config.optimizer, **values),
        eval_every=50,
        log_every=50,
        checkpoint_every=config.steps,
    )


_LLAMA = _with_rule(LLAMA["demo"])
_MAE = _with_rule(MAE["demo"], weight_decay=0.05)


def _sized(
    hidden_size: int, inner: int, layers: int, heads: int, kv_heads: int
) -> TrainConfig[Any]:
    model = ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        unroll=layers,
    )
    return replace(_LLAMA, task=LlamaTask(model, _LLAMA.task.data))


_RATES = ("1e-3", "2e-3", "4e-3", "8e-3")
_OF_SIZE: Sweep = {"learning_rate": _RATES, "b1": ("0.8", "0.9", "0.95")}

_VARIANTS: tuple[Sweep, ...] = (
    {},
    {"opposed_weight": ("0.25",)},
    {"opposed_weight": ("0.5",)},
    {"opposed_weight": ("-1.0",)},
    {"renormalize": ("none",)},
    {"renormalize": ("plus_one",)},
    {"neutral": ("follow",)},
    {"neutral": ("ignore",)},
    {"exempt": ("embedding",)},
    {"alignment": ("leaf",)},
    {"alignment": ("tree",)},
)

QUESTIONS: dict[str, Question] = {
    "adamw": Question(
        "Does it help AdamW when both are tuned?",
        _LLAMA,
        (
            {
                "learning_rate": ("2e-3", "4e-3", "8e-3"),
                "b1": ("0.6", "0.8", "0.9", "0.95", "0.98"),
            },
        ),
    ),
    "rule": Question(
        "Which part of the rule does it?",
        _LLAMA,
        tuple({"learning_rate": (*_RATES, "1.6e-2"), **v} for v in _VARIANTS),
    ),
    "decay": Question(
        "And cautious weight decay?",
        _LLAMA,
        tuple(
            {
                "learning_rate": ("2e-3", "4e-3"),
                "weight_decay": ("0.1", "0.5", "1.0", "2.0"),
                "cautious_decay": (cautious,),
            }
            for cautious in ("false", "true")
        ),
    ),
    "mae": Question(
        "Does it help a masked autoencoder?",
        _MAE,
        ({"learning_rate": _RATES, "b1": ("0.8", "0.9", "0.95")},),
    ),
    "lion": Question(
        "Does it help Lion?",
        _LLAMA,
        (
            {
                "learning_rate": ("2.5e-4", "5e-4", "1e-3", "2e-3"),
                "b1": ("0.8", "0.9", "0.95", "0.98"),
            },
        ),
        ("lion",),
    ),
    "muon": Question(
        "Does it help Muon?",
        _LLAMA,
        ({"learning_rate": ("2e-3", "4e-3", "8e-3"), "b1": ("0.8", "0.9", "0.95")},),
        ("muon",),
    ),
    "size-0.3m": Question("0.3 million", _sized(64, 172, 2, 2, 1), (_OF_SIZE,)),
    "size-4m": Question("4 million", _sized(256, 688, 4, 8, 4), (_OF_SIZE,)),
    "size-9m": Question(
        "9 million", _sized(384, 1032, 5, 8, 4), (_OF_SIZE,), seeds=(1, 2)
    ),
}
"""In the order in which they are run."""
