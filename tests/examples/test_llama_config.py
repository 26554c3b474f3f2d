"""The Llama example: its settings and its command line."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("tyro", reason="needs the extra [examples]")

from examples.llama import compare, train
from examples.llama.checks import InputError
from examples.llama.command_line import Start, run_training_command
from examples.llama.config import (
    MODELS,
    PRESETS,
    DataConfig,
    ModelConfig,
    ModelName,
    OptimizerConfig,
    OptimizerName,
    TrainConfig,
    base_name,
    from_json,
    title,
    to_json,
)


def echo(
    number: int = 1,
    start: Start = Start(),  # noqa: B008
    config: TrainConfig = TrainConfig(),  # noqa: B008
) -> tuple[int, TrainConfig]:
    """Return the settings.

    Args:
        number: an argument of the command's own.
        start: where the settings start from.
        config: the settings.
    """
    return number, config


def parse(command):
    return run_training_command(echo, command.split())[1]


def test_without_arguments():
    assert run_training_command(echo, []) == (1, TrainConfig())


def test_an_option_changes_one_setting():
    assert run_training_command(echo, ["--number", "7", "--steps", "9"]) == (
        7,
        replace(TrainConfig(), steps=9),
    )


@pytest.mark.parametrize("name", get_args(ModelName))
def test_a_model_sets_the_architecture_and_the_context(name):
    config = parse(f"--model {name}")
    assert config.model == MODELS[name]
    assert config.data.sequence_length == {"tiny": 128, "7b": 2048}.get(name, 1024)
    assert config.optimizer == TrainConfig().optimizer


def test_options_change_what_the_model_and_the_preset_say():
    config = parse("--num-kv-heads 4 --model=60m --preset paper --steps 3 --mesh 1 2 2")
    assert config.model == replace(MODELS["60m"], num_kv_heads=4)
    expected = replace(PRESETS["paper"], model=config.model, steps=3, mesh=(1, 2, 2))
    assert config == expected


def test_the_recipe_of_the_paper():
    config = parse("--preset paper --learning-rate 1e-3")
    optimizer = config.optimizer
    assert (config.steps, optimizer.warmup_fraction * config.steps) == (10_000, 1000)
    assert (config.data.batch_size, config.data.sequence_length) == (512, 1024)
    assert (optimizer.max_grad_norm, optimizer.weight_decay) == (1.0, 0.0)
    assert (optimizer.final_fraction, config.model.dtype) == (0.1, "bfloat16")
    assert config.data.data == ("hf:allenai/c4:en",)
    assert config.data.tokenizer == "t5-base"
    assert config.model == MODELS["60m"]


@pytest.mark.parametrize("config", [*PRESETS.values(), parse("--mesh 2 2 2")])
def test_a_saved_configuration_is_the_same(config, tmp_path):
    text = to_json(config)
    assert from_json(text, "text") == config
    (tmp_path / "config.json").write_text(text)
    file = tmp_path / "config.json"
    assert parse(f"--config-file {file}") == config
    assert parse(f"--config-file {file} --seed 3") == replace(config, seed=3)


def test_a_setting_that_is_not_in_a_file_has_its_default():
    text = '{"steps": 7, "data": {"batch_size": 4}}'
    data = replace(TrainConfig().data, batch_size=4)
    assert from_json(text, "text") == TrainConfig(steps=7, data=data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the configuration of a run: Invalid JSON"),
        ('{"steps": "7"}', "not the configuration of a run: steps: Input should be"),
        ("[]", "not the configuration of a run"),
        (to_json(TrainConfig()).replace("seed", "sed"), "run: sed: Unexpected"),
        (
            to_json(TrainConfig()).replace('"data": []', '"data": "corpus.txt"'),
            r"run: data\.data: Input should be a valid array",
        ),
        (
            to_json(TrainConfig()).replace('"remat": false', '"remat": "no"'),
            r"run: model\.remat: Input should be a valid boolean",
        ),
        ('{"steps": 0}', "not the configuration of a run: steps is 0: it has to be"),
    ],
)
def test_a_file_that_is_no_configuration(text, message, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=f"error: {file} is {message}|{message}"):
        parse(f"--config-file {file}")
    with pytest.raises(SystemExit, match=r"error: config_file: cannot read .*missing"):
        parse(f"--config-file {tmp_path / 'missing'}")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for settings in (ModelConfig, DataConfig, OptimizerConfig, TrainConfig, Start):
        for name in settings.__dataclass_fields__:
            if name not in ("model", "optimizer") or settings is OptimizerConfig:
                assert re.search(f"--{name.replace('_', '-')}[ ,]", text), name
    # An option without an explanation has its default alone below it.
    lines = [line.strip("│ ") for line in text.splitlines()]
    for option, explanation in itertools.pairwise(lines):
        if option.startswith("--"):
            assert not explanation.startswith("(default"), option


def test_help_has_the_defaults_of_the_model(capsys):
    with pytest.raises(SystemExit):
        parse("--model 350m --help")
    assert "(default: 2736)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--model 61m", "'61m'"),
        ("--preset big", "'big'"),
        ("--optimizer adam", "'adam'"),
        ("--num-heads 3", "num_heads (3) does not divide"),
        ("--stepps 3", "--stepps"),
        ("--steps many", "many"),
    ],
)
def test_a_command_that_cannot_run_says_why(command, message, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(command)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ModelConfig, {"vocab_size": 0}, "vocab_size is 0"),
        (ModelConfig, {"num_heads": 5}, r"num_heads \(5\) does not divide hidden_size"),
        (ModelConfig, {"num_kv_heads": 3}, r"num_kv_heads \(3\) does not divide"),
        (ModelConfig, {"hidden_size": 12}, "hidden_size / num_heads is 3"),
        (ModelConfig, {"num_layers": 0}, "num_layers is 0"),
        (ModelConfig, {"num_heads": 0}, "num_heads is 0"),
        (ModelConfig, {"intermediate_size": -1}, "intermediate_size is -1"),
        (ModelConfig, {"rope_theta": 0.0}, "rope_theta is 0"),
        (ModelConfig, {"dtype": "int8"}, "dtype is 'int8': choose one of float32, bf"),
        (ModelConfig, {"unroll": 0}, "unroll is 0"),
        (DataConfig, {"sequence_length": 0}, "sequence_length is 0"),
        (DataConfig, {"batch_size": 0}, "batch_size is 0"),
        (DataConfig, {"validation_batches": 0}, "validation_batches is 0"),
        (DataConfig, {"shuffle_windows": 0}, "shuffle_windows is 0"),
        (DataConfig, {"validation_fraction": 1.0}, "validation_fraction is 1"),
        (DataConfig, {"validation_fraction": math.nan}, "validation_fraction is nan"),
        (DataConfig, {"data": ("good", "b\udcffd")}, r"data: 'b\\udcffd' is not UTF-8"),
        (DataConfig, {"cache_dir": Path("b\udcffd")}, r"cache_dir: .* is not UTF-8"),
        (OptimizerConfig, {"optimizer": "adam"}, "'adam': choose one of adamw, caut"),
        (OptimizerConfig, {"optimizer": "sgd"}, "learning_rate: .* default for sgd"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate is 0"),
        (OptimizerConfig, {"learning_rate": math.nan}, "learning_rate is nan"),
        (OptimizerConfig, {"learning_rate": math.inf}, "learning_rate is inf"),
        (OptimizerConfig, {"b1": 1.0}, "b1 is 1.0"),
        (OptimizerConfig, {"b2": -0.1}, "b2 is -0.1"),
        (OptimizerConfig, {"weight_decay": -1.0}, "weight_decay is -1"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, "max_grad_norm is 0"),
        (OptimizerConfig, {"warmup_fraction": 1.0}, "warmup_fraction is 1"),
        (OptimizerConfig, {"final_fraction": 1.1}, "final_fraction is 1.1"),
        (
            OptimizerConfig,
            {"optimizer": "lion", "opposed_weight": 0.5, "exempt_embedding": True},
            "opposed_weight, exempt_embedding: lion has no caution; .* cautious_lion",
        ),
        (TrainConfig, {"steps": 0}, "steps is 0"),
        (TrainConfig, {"eval_every": 0}, "eval_every is 0"),
        (TrainConfig, {"log_every": 0}, "log_every is 0"),
        (TrainConfig, {"keep": 0}, "keep is 0"),
        (TrainConfig, {"checkpoint_every": 30}, "not a multiple of eval_every"),
        (TrainConfig, {"accumulate": 3}, r"accumulate \(3\) does not divide batch_si"),
        (TrainConfig, {"mesh": (1, 0, 1)}, "mesh is 0"),
        (TrainConfig, {"seed": -1}, "seed is -1"),
    ],
)
def test_a_setting_out_of_range(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        kind(**arguments)


def test_learning_rates_by_default():
    rates = {
        name: OptimizerConfig(optimizer=name).peak
        for name in ("adamw", "cautious_adamw", "lion", "cautious_lion")
    }
    assert list(rates.values()) == [2e-3, 2e-3, 5e-4, 5e-4]


def test_a_configuration_for_another_optimizer():
    cautious = OptimizerConfig(
        opposed_weight=0.5, exempt_embedding=True, weight_decay=0.1, b1=0.8
    )
    lion = cautious.named("lion", None)
    assert lion == OptimizerConfig(optimizer="lion", weight_decay=0.1, b1=0.8)
    other = cautious.named("cautious_lion", 1e-3)
    assert other == replace(cautious, optimizer="cautious_lion", learning_rate=1e-3)


def test_every_optimizer_has_a_cautious_version_and_a_title():
    names = get_args(OptimizerName)
    assert {base_name(name) for name in names} == {
        name for name in names if not name.startswith("cautious_")
    }
    assert len(names) == 2 * len({base_name(name) for name in names})
    assert title("cautious_adamw") == "cautious AdamW"
    assert title("lion") == "Lion"


def test_the_saved_configuration_is_json_with_every_setting():
    values = json.loads(to_json(TrainConfig()))
    assert set(values) == set(TrainConfig.__dataclass_fields__)
    assert set(values["data"]) == set(DataConfig.__dataclass_fields__)


@pytest.mark.parametrize("command", [train.train, compare.compare])
def test_the_default_learning_rate_is_not_for_larger_models(
    command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "60m", f"--data={tmp_path}/none"]
    with pytest.raises(SystemExit, match=r"^error: learning_rate: .* here it is 512"):
        run_training_command(command, arguments)
    with pytest.raises(SystemExit, match=r"^error: data: there is no"):
        run_training_command(command, ["--learning-rate=1e-3", *arguments])
