"""The questions of the study, and the arms and grids that answer them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.glue.task import PRESETS as GLUE
from examples.llama.config import ModelConfig
from examples.llama.task import PRESETS as LLAMA
from examples.llama.task import LlamaTask
from examples.mae.task import PRESETS as MAE
from examples.training.config import TrainConfig
from examples.training.history import Side

TUNING_SEED = 0
"""The seed of the tuning runs."""

SEEDS = (1, 2, 3, 4, 5)
"""The seeds of the compared runs, which exclude the tuning seed."""

PRETRAINED = Path("outputs") / "llama" / "pretrained"
"""Directory of the pretrained models."""

Grid = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Arm:
    """One of the ways to train that a question compares."""

    title: str
    side: Side
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings in addition to the grid. In a value, ``{seed}`` stands for the seed."""
    grid: Grid = field(default_factory=dict)
    """Grid settings whose values differ from the question's."""
    against: tuple[str, ...] = ()
    """Titles of the arms that it is compared with."""


@dataclass(frozen=True)
class Question:
    """Arms that are tuned on one grid and then compared."""

    title: str
    model: str
    """What is trained, in a few words."""
    config: TrainConfig[Any]
    grid: Grid
    arms: tuple[Arm, ...]
    one_at_a_time: bool = False
    """Whether to tune the settings of the grid in turn, each with the others at the
    best value found so far, or else the first listed, until the best point does not
    change, instead of all points."""
    drop_in: bool = True
    """Whether to also train each arm at the best point of the first arm that it is
    compared with, which shows the effect of turning on caution without retuning."""
    drop_out: bool = False
    """Whether to also train that first arm at the best point of the other, which shows
    the effect of turning off caution without retuning."""
    seeds: tuple[int, ...] = SEEDS
    pretraining: TrainConfig[Any] | None = None
    """Settings of the models from which the runs start, in ``PRETRAINED``."""
    score: str = ""
    """The score to compare. Empty: the validation loss, which always selects points."""
    note: str = ""
    """A remark for the readers of the page."""


def _with_and_without(optimizer: str = "adamw") -> tuple[Arm, Arm]:
    base, cautious = Side(optimizer, False), Side(optimizer, True)
    return (
        Arm(base.title, base),
        Arm(cautious.title, cautious, against=(base.title,)),
    )


_ADAMW, _CAUTIOUS = _with_and_without()


def _variant(title: str, grid: Grid | None = None, **settings: str) -> Arm:
    """Build an arm of caution, compared with the published rule and with AdamW."""
    against = (_CAUTIOUS.title, _ADAMW.title)
    return Arm(title, _CAUTIOUS.side, settings, grid or {}, against)


def _with_rule(config: TrainConfig[Any], **optimizer: Any) -> TrainConfig[Any]:
    """Set the values of the paper's Table 1: second moments over 20 steps, decay."""
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


_RATES = ("0.001", "0.002", "0.004", "0.008")
_OF_DEMO = ("0.002", "0.003", "0.004", "0.008")
_LOWER_RATES = replace(
    _ADAMW, grid={"learning_rate": ("0.001", "0.002", "0.003", "0.004")}
)
"""AdamW for the demo's model, where its best rate at b1 0.9 is lower than caution's."""
_SMALL = _sized(64, 172, 2, 2, 1)
_B1 = ("0.9", "0.8", "0.95")

_OPPOSED = (
    _variant("opposed weight 0.25", opposed_weight="0.25"),
    _variant("opposed weight 0.5", opposed_weight="0.5"),
)
_NOT_RESCALED = _variant(
    "renormalize: none",
    {"learning_rate": ("0.002", "0.004", "0.008", "0.016", "0.032")},
    renormalize="none",
)

_ZERO_GRADIENTS = (
    _variant("embedding exempt", exempt="embedding"),
    _variant("neutral: follow", neutral="follow"),
)
"""Variants that treat zero gradients, which embeddings have, in another way."""

_FAMILY = (
    _ADAMW,
    replace(_CAUTIOUS, grid={"learning_rate": ("0.004", "0.008", "0.016", "0.032")}),
    *_ZERO_GRADIENTS,
    _variant("neutral: ignore", neutral="ignore"),
    *_OPPOSED,
    _variant("opposed weight -1", opposed_weight="-1.0"),
    _variant("renormalize: plus one", renormalize="plus_one"),
    _NOT_RESCALED,
    _variant("Grams", _NOT_RESCALED.grid, opposed_weight="-1.0", renormalize="none"),
    _variant("alignment: leaf", alignment="leaf"),
    _variant("alignment: tree", alignment="tree"),
    _variant("one leaf per stack", per_layer="false"),
    _variant("alignment: tree, whole model", alignment="tree", per_layer="false"),
)
"""AdamW, the published rule, and its variants."""


def _decay_arms(adamw: Arm) -> tuple[Arm, ...]:
    """Build the arms with and without caution, and with and without cautious decay."""
    cautious_decay = {"cautious_decay": "true"}
    return (
        adamw,
        replace(
            adamw,
            title="AdamW, cautious decay",
            settings=cautious_decay,
            against=(adamw.title,),
        ),
        _CAUTIOUS,
        Arm(
            "cautious AdamW, cautious decay",
            _CAUTIOUS.side,
            cautious_decay,
            against=(_CAUTIOUS.title, adamw.title),
        ),
    )


def _after(pretrained: str, caution: bool, against: tuple[str, ...]) -> Arm:
    """Build an arm that fine-tunes pretrained models, each with its own seed."""
    side = Side("adamw", caution)
    directory = f"{PRETRAINED}/{pretrained}-learning_rate=0.002-seed{{seed}}"
    title = f"{side.title}, after {pretrained.replace('-', ' ')}"
    title = title.replace("adamw", "AdamW")
    return Arm(title, side, {"from_run": directory}, against=against)


QUESTIONS: dict[str, Question] = {
    "adamw": Question(
        "Does caution help AdamW when both are tuned?",
        "1M Llama",
        _LLAMA,
        {
            "learning_rate": _OF_DEMO,
            "b1": ("0.4", "0.6", "0.8", "0.9", "0.95", "0.98"),
        },
        _with_and_without(),
    ),
    "size-0.3m": Question(
        "A Llama of 0.35 million parameters",
        "0.35M Llama",
        _SMALL,
        {
            "learning_rate": (*_RATES, "0.016", "0.032"),
            "b1": ("0.8", "0.9", "0.95", "0.98"),
        },
        _with_and_without(),
    ),
    "size-4m": Question(
        "A Llama of 4 million parameters",
        "4M Llama",
        _sized(256, 688, 4, 8, 4),
        {
            "learning_rate": ("0.0005", "0.001", "0.0015", "0.002", "0.004"),
            "b1": ("0.8", "0.6", "0.9"),
        },
        (
            _ADAMW,
            replace(_CAUTIOUS, grid={"b1": ("0.95", "0.9", "0.98", "0.8", "0.6")}),
        ),
        one_at_a_time=True,
        drop_out=True,
        note="Tuning starts at the value of b1 that is best for each arm in the Llama "
        "of 1 million parameters.",
    ),
    "size-9m": Question(
        "A Llama of 9 million parameters",
        "9M Llama",
        _sized(384, 1032, 5, 8, 4),
        {
            "learning_rate": ("0.0005", "0.001", "0.0015", "0.002"),
            "b1": ("0.8", "0.6", "0.9"),
        },
        (
            _ADAMW,
            replace(_CAUTIOUS, grid={"learning_rate": ("0.001", "0.0015", "0.002")}),
        ),
        one_at_a_time=True,
        seeds=(1, 2, 3),
        note="Tuning starts at the value of b1 that is best for both arms in the Llama "
        "of 4 million parameters.",
    ),
    "lion": Question(
        "Does caution help Lion with b2 0.95?",
        "1M Llama, b2 0.95",
        _LLAMA,
        {
            "learning_rate": ("0.00025", "0.0005", "0.001", "0.002"),
            "b1": (*_B1, "0.98", "0.6", "0.4"),
        },
        _with_and_without("lion"),
        one_at_a_time=True,
        note="For Lion, b1 weights the momentum in the update, and b2 is the "
        "momentum's decay.",
    ),
    "lion-0.98": Question(
        "Does caution help Lion with b2 0.98?",
        "1M Llama, b2 0.98",
        _with_rule(LLAMA["demo"], b2=0.98),
        {
            "learning_rate": ("0.00025", "0.0005", "0.001", "0.002"),
            "b1": ("0.8", "0.6", "0.9", "0.95", "0.4"),
        },
        _with_and_without("lion"),
        one_at_a_time=True,
        note="The paper's Lion has b1 0.95 and b2 0.98.",
    ),
    "muon": Question(
        "Does caution help Muon?",
        "1M Llama",
        _LLAMA,
        {
            "learning_rate": ("0.004", "0.008", "0.016", "0.032"),
            "b1": (*_B1, "0.6", "0.4", "0.2"),
        },
        (
            *_with_and_without("muon"),
            Arm(
                "cautious Muon, on the momentum",
                Side("muon", True),
                {"caution_on": "momentum"},
                against=("Muon", "cautious Muon"),
            ),
        ),
        one_at_a_time=True,
        note="Embedding, head and norms are left to AdamW, with the same learning rate "
        "and b1; in the arms with caution, to cautious AdamW.",
    ),
    "mae": Question(
        "Does caution help a masked autoencoder?",
        "masked autoencoder",
        _MAE,
        {"learning_rate": _RATES, "b1": (*_B1, "0.6", "0.4")},
        _with_and_without(),
        one_at_a_time=True,
    ),
    "glue": Question(
        "Does caution help in fine-tuning?",
        "fine-tuned Llama",
        replace(GLUE["package"], checkpoint_every=GLUE["package"].steps),
        {"learning_rate": ("0.0005", "0.001", "0.002", "0.004", "0.008")},
        (
            _after("adamw", False, ()),
            _after("adamw", True, ("AdamW, after AdamW",)),
            _after("cautious-adamw", False, ("AdamW, after AdamW",)),
            _after(
                "cautious-adamw",
                True,
                (
                    "AdamW, after cautious AdamW",
                    "AdamW, after AdamW",
                    "cautious AdamW, after AdamW",
                ),
            ),
        ),
        drop_in=False,
        pretraining=LLAMA["demo"],
        score="accuracy",
        note="Each seed has its own pretrained models, trained like those of `make "
        "demo`. [glue.md](glue.md) describes the task, `package`.",
    ),
    "rule-0.3m": Question(
        "Which part of the rule matters? 0.35 million parameters, b1 0.9",
        "0.35M Llama, b1 0.9",
        _SMALL,
        {"learning_rate": ("0.004", "0.008", "0.016")},
        _FAMILY,
        drop_in=False,
        note="The variants, which [Rules](rules.md) defines, are compared with "
        "cautious AdamW, the published rule, and with AdamW. If none of them differed "
        "from the published rule, and the comparisons were independent, at least one "
        "interval would still exclude zero with a probability of "
        f"{1 - 0.95 ** (len(_FAMILY) - 2):.0%}. The optimizer is applied to each layer "
        "separately, so `alignment: tree` has an inner product for each layer, and one "
        "for all other parameters. In the last two arms, the optimizer sees stacked "
        "layers as one leaf, as in Optax, and `stacked` is not set.",
    ),
    "rule": Question(
        "Which part of the rule matters? 1 million parameters, b1 0.9",
        "1M Llama, b1 0.9",
        _LLAMA,
        {"learning_rate": _OF_DEMO},
        (
            _LOWER_RATES,
            Arm("AdamW, b1 0.8", _ADAMW.side, {"b1": "0.8"}),
            replace(_CAUTIOUS, against=(_ADAMW.title, "AdamW, b1 0.8")),
            *_ZERO_GRADIENTS,
            *_OPPOSED,
            _NOT_RESCALED,
        ),
        drop_in=False,
        note="The opposed weights are the variants that end lower than the published "
        "rule with 0.35 million parameters; each of the others changes one part of "
        "the rule. Where b1 is tuned, AdamW is best with 0.8.",
    ),
    "decay": Question(
        "Does cautious weight decay help at b1 0.9, alone and with caution?",
        "1M Llama, b1 0.9, decay tuned",
        _LLAMA,
        {"learning_rate": _OF_DEMO, "weight_decay": ("0.1", "0.5", "1", "2")},
        _decay_arms(_LOWER_RATES),
        one_at_a_time=True,
        drop_in=False,
    ),
    "decay-1": Question(
        "Does cautious weight decay help at b1 0.9 and a large decay?",
        "1M Llama, b1 0.9, decay 1",
        _with_rule(LLAMA["demo"], weight_decay=1.0),
        {"learning_rate": (_RATES[0], *_OF_DEMO)},
        _decay_arms(_ADAMW),
        drop_in=False,
        note="The decay is ten times that of the paper, so that it matters in a short "
        "run.",
    ),
}
"""The questions by name, in the order of the page."""

SIZES = ("size-0.3m", "adamw", "size-4m", "size-9m")
"""The questions that differ in model size, and in their grids."""

RULES = ("rule-0.3m", "rule")
"""The questions that compare variants of the rule, at different sizes."""

PUBLISHED = _CAUTIOUS.title
"""The arm of the published rule."""
