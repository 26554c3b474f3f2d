"""The settings and the command line of the Llama example."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="needs the extra [examples]")

from examples.llama import __main__ as llama
from examples.llama.config import MODELS, DataConfig, ModelConfig
from examples.llama.task import EXPERIMENT, PRESETS, LlamaTask
from examples.mae import __main__ as mae
from examples.training.checks import InputError
from examples.training.command_line import main
from examples.training.config import TrainConfig, from_json, to_json
from examples.training.optimizers import OPTIMIZERS, OptimizerConfig, title
from tests.examples.training_fixtures import changed, named, run_command

DEFAULT = TrainConfig(LlamaTask())
TRAIN = partial(TrainConfig, LlamaTask())


def echo(number: int = 1, *, config: TrainConfig[LlamaTask]):
    """Return the settings.

    Args:
        number: an argument of the command.
        config: the settings.
    """
    return number, config


def run(arguments):
    return main("program", EXPERIMENT, {"echo": echo}, ["echo", *arguments])


def parse(command):
    return run(command.split())[1]


def test_without_arguments():
    assert run([]) == (1, DEFAULT)


def test_an_option_changes_one_setting():
    assert run(["--number", "7", "--steps", "9"]) == (
        7,
        replace(DEFAULT, steps=9),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_sets_the_architecture_and_the_context(name):
    config = parse(f"--model {name}")
    assert config.task.model == MODELS[name]
    assert config.task.data.sequence_length == {"tiny": 128, "7b": 2048}.get(name, 1024)
    assert config.optimizer == DEFAULT.optimizer


def test_options_override_the_model_and_the_preset():
    config = parse("--num-kv-heads 4 --model=60m --preset paper --steps 3 --mesh 1 2 2")
    assert config.task.model == replace(MODELS["60m"], num_kv_heads=4)
    task = replace(PRESETS["paper"].task, model=config.task.model)
    assert config == replace(PRESETS["paper"], task=task, steps=3, mesh=(1, 2, 2))


def test_the_recipe_in_the_readme_of_the_papers_code():
    config = parse("--preset c-optim --learning-rate 1e-3")
    optimizer = config.optimizer
    assert (config.steps, optimizer.warmup_fraction * config.steps) == (10_000, 1000)
    assert (config.task.data.batch_size, config.task.data.sequence_length) == (
        512,
        1024,
    )
    assert (optimizer.b1, optimizer.b2) == (0.9, 0.999)
    assert (optimizer.max_grad_norm, optimizer.weight_decay) == (1.0, 0.0)
    assert (optimizer.final_fraction, config.task.model.dtype) == (0.1, "bfloat16")
    assert config.task.data.data == ("hf:allenai/c4:en",)
    assert config.task.data.tokenizer == "t5-base"
    assert config.task.model == MODELS["60m"]


def test_the_recipe_of_the_papers_table():
    config = parse("--preset paper --learning-rate 1e-3")
    optimizer = config.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert config.task.model == MODELS["100m"]
    assert config.task.units == pytest.approx(2e6, rel=0.05)
    assert config.task.units * config.steps == pytest.approx(50e9, rel=0.01)


@pytest.mark.parametrize("config", [*PRESETS.values(), parse("--mesh 2 2 2")])
def test_a_saved_configuration_is_restored(config, tmp_path):
    text = to_json(config)
    assert from_json(text, "text", LlamaTask) == config
    (tmp_path / "config.json").write_text(text)
    file = tmp_path / "config.json"
    assert parse(f"--config-file {file}") == config
    assert parse(f"--config-file {file} --seed 3") == replace(config, seed=3)


def test_settings_missing_from_a_file_have_their_defaults():
    text = '{"steps": 7, "task": {"data": {"batch_size": 4}}}'
    expected = changed(DEFAULT, steps=7, data={"batch_size": 4})
    assert from_json(text, "text", LlamaTask) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the configuration of a run: Invalid JSON"),
        (
            '{"task": {}, "steps": "7"}',
            "a run: steps: Input should be",
        ),
        ("[]", "not the configuration of a run"),
        (to_json(DEFAULT).replace("seed", "sed"), "run: sed: Unexpected"),
        (
            to_json(DEFAULT).replace('"data": []', '"data": "corpus.txt"'),
            r"run: task\.data\.data: Input should be a valid array",
        ),
        (
            to_json(DEFAULT).replace('"remat": "none"', '"remat": "no"'),
            r"run: task\.model\.remat: Input should be 'none', 'dots' or 'full'",
        ),
        (
            '{"task": {}, "steps": 0}',
            "a run: steps must be positive, got 0",
        ),
    ],
)
def test_an_invalid_configuration_file(text, message, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=f"error: {file} is {message}|{message}"):
        parse(f"--config-file {file}")
    with pytest.raises(SystemExit, match=r"error: config_file: cannot read .*missing"):
        parse(f"--config-file {tmp_path / 'missing'}")
    with pytest.raises(SystemExit, match=r"error: preset: cannot be combined with --c"):
        parse(f"--config-file {file} --preset paper")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match=r"error: config_file: cannot .*not UTF-8 tex"):
        parse(f"--config-file {file}")


def in_one_line(text):
    return " ".join(re.sub("[│╭╰─╮╯]", " ", text).split())


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for settings in (ModelConfig, DataConfig, OptimizerConfig, TrainConfig):
        for name in settings.__dataclass_fields__.keys() - {"task", "from_run"}:
            assert re.search(f"--{name.replace('_', '-')}[ ,]", text), name
    for name in ("preset", "model", "config-file", "from"):
        assert re.search(f"--{name}[ ,]", text), name
    # Without a help text, the default directly follows the placeholders of the values.
    unexplained = re.findall(r"--\S+(?: [A-Z{\[]\S*)* \(default", in_one_line(text))
    assert not unexplained


@pytest.mark.parametrize(
    ("experiment", "command"),
    [(llama, name) for name in llama.COMMANDS] + [(mae, name) for name in mae.COMMANDS],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_every_command_has_a_help_page(experiment, command, capsys):
    with pytest.raises(SystemExit) as raised:
        main("program", experiment.EXPERIMENT, experiment.COMMANDS, [command, "-h"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: program {command} [-h]")


def test_help_shows_the_defaults_of_the_model(capsys):
    with pytest.raises(SystemExit):
        parse("--model 350m --help")
    assert "(default: 2736)" in in_one_line(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--model 61m", "'61m'"),
        ("--preset big", "'big'"),
        ("--optimizer adam", "'adam'"),
        ("--num-heads 3", "num_heads (3) must divide"),
        ("--stepps 3", "--stepps"),
        ("--steps many", "many"),
    ],
)
def test_invalid_options_are_reported(command, message, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(command)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_the_commands_are_listed(capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["trian"], 2)):
        with pytest.raises(SystemExit) as raised:
            main("program", EXPERIMENT, {"echo": echo}, arguments)
        assert raised.value.code == code
        captured = capsys.readouterr()
        text = captured.err if code else captured.out
        assert "usage: program COMMAND" in text
        assert "echo  Return the settings." in text


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ModelConfig, {"vocab_size": 0}, "vocab_size must be positive, got 0"),
        (ModelConfig, {"num_heads": 5}, r"num_heads \(5\) must divide hidden_size"),
        (ModelConfig, {"num_kv_heads": 3}, r"num_kv_heads \(3\) must divide"),
        (ModelConfig, {"hidden_size": 12}, "num_heads must be even, got 3"),
        (ModelConfig, {"num_layers": 0}, "num_layers must be positive, got 0"),
        (ModelConfig, {"num_heads": 0}, "num_heads must be positive, got 0"),
        (ModelConfig, {"intermediate_size": -1}, "intermediate_size must be positive"),
        (ModelConfig, {"rope_theta": 0.0}, "rope_theta must be positive, got 0"),
        (ModelConfig, {"dtype": "int8"}, "dtype must be one of float32, .* 'int8'"),
        (ModelConfig, {"unroll": 0}, "unroll must be positive, got 0"),
        (DataConfig, {"sequence_length": 0}, "sequence_length must be positive, got 0"),
        (DataConfig, {"batch_size": 0}, "batch_size must be positive, got 0"),
        (DataConfig, {"validation_batches": 0}, "validation_batches must be positive"),
        (DataConfig, {"shuffle_windows": 0}, "shuffle_windows must be positive, got 0"),
        (DataConfig, {"validation_fraction": 1.0}, "fraction must be .*, got 1.0"),
        (DataConfig, {"validation_fraction": math.nan}, "fraction must be .*, got nan"),
        (DataConfig, {"data": ("good", "b\udcffd")}, r"data: 'b\\udcffd' is not UTF-8"),
        (DataConfig, {"cache_dir": Path("b\udcffd")}, r"cache_dir: .* is not UTF-8"),
        (OptimizerConfig, {"optimizer": "adam"}, "must be one of adamw, .* 'adam'"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate must be positive"),
        (OptimizerConfig, {"learning_rate": math.nan}, "rate must be .*, got nan"),
        (OptimizerConfig, {"learning_rate": math.inf}, "rate must be .*, got inf"),
        (OptimizerConfig, {"b1": 1.0}, "b1 must be .*, got 1.0"),
        (OptimizerConfig, {"b2": -0.1}, "b2 must be .*, got -0.1"),
        (OptimizerConfig, {"weight_decay": -1.0}, "weight_decay must be .*, got -1"),
        (OptimizerConfig, {"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        (OptimizerConfig, {"warmup_fraction": 1.0}, "warmup_fraction must .* got 1.0"),
        (OptimizerConfig, {"final_fraction": 1.1}, "final_fraction must .* got 1.1"),
        (
            OptimizerConfig,
            {"caution": False, "opposed_weight": 0.5, "exempt": ("logits",)},
            "opposed_weight, exempt can only be set .* pass --caution",
        ),
        (TRAIN, {"steps": 0}, "steps must be positive, got 0"),
        (TRAIN, {"eval_every": 0}, "eval_every must be positive, got 0"),
        (TRAIN, {"log_every": 0}, "log_every must be positive, got 0"),
        (TRAIN, {"keep": 0}, "keep must be positive, got 0"),
        (
            TrainConfig,
            {"task": LlamaTask(), **{"checkpoint_every": 30}},
            "must be a multiple of eval_every",
        ),
        (
            TrainConfig,
            {"task": LlamaTask(), **{"accumulate": 3}},
            r"accumulate \(3\) must divide batch_size",
        ),
        (TRAIN, {"mesh": (1, 0, 1)}, "mesh must be positive, got 0"),
        (TRAIN, {"seed": -1}, "seed must be .*, got -1"),
    ],
)
def test_a_setting_out_of_range(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        kind(**arguments)


def test_default_learning_rates():
    rates = {
        name: changed(DEFAULT, optimizer=named(name)).learning_rate
        for name in ("adamw", "cautious_adamw", "lion", "cautious_lion")
    }
    assert list(rates.values()) == [2e-3, 2e-3, 5e-4, 5e-4]
    sgd = changed(DEFAULT, optimizer={"optimizer": "sgd"})
    with pytest.raises(InputError, match=r"learning_rate: .* no default for SGD and"):
        _ = sgd.learning_rate


def test_an_optimizer_without_caution():
    cautious = OptimizerConfig(
        "lion", opposed_weight=0.5, exempt=("embedding",), weight_decay=0.1, b1=0.8
    )
    plain = OptimizerConfig("lion", caution=False, weight_decay=0.1, b1=0.8)
    assert cautious.without_caution() == plain


def test_titles():
    assert title("adamw", True) == "cautious AdamW"
    assert title("lion", False) == "Lion"
    assert len({row.title for row in OPTIMIZERS.values()}) == len(OPTIMIZERS)


def test_the_saved_configuration_is_json_with_every_setting():
    values = json.loads(to_json(DEFAULT))
    assert set(values) == set(TrainConfig.__dataclass_fields__)
    assert set(values["task"]["data"]) == set(DataConfig.__dataclass_fields__)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_larger_models_have_no_default_learning_rate(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "60m", f"--data={tmp_path}/none"]
    with pytest.raises(SystemExit, match=r"^error: learning_rate: .* and this model"):
        run_command(command, arguments)
    with pytest.raises(SystemExit, match=r"^error: data: .* does not exist"):
        run_command(command, ["--learning-rate=1e-3", *arguments])
    assert not list(tmp_path.rglob("config.json"))
