"""Export of a fine-tuned model, and parity of its logits with transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest

for _module in ("grain", "orbax.checkpoint", "sklearn", "tokenizers", "tyro"):
    pytest.importorskip(_module, reason="needs the extra [examples]")

# ruff: noqa: E402

from examples.glue.config import DataConfig, HeadConfig
from examples.glue.data import make_examples
from examples.glue.export import export
from examples.glue.standard_library import Row
from examples.glue.task import ClassificationTask
from examples.llama.config import DataConfig as LlamaDataConfig
from examples.llama.pretrained import read_vocabulary
from examples.llama.task import LlamaTask
from examples.training.checks import InputError
from examples.training.config import TrainConfig
from examples.training.optimizers import OptimizerConfig
from examples.training.trained import Source, load_trained
from tests.examples.training_fixtures import MODEL, train, write_documents

pytestmark = pytest.mark.usefixtures("little_optimization")

TEXTS = ("the optimizer moves", "x", "a weight along its gradient " * 9)


def fine_tune(directory, labels):
    """Train a Llama and fine-tune it; with one label, to predict numbers."""
    documents = directory / "documents"
    documents.mkdir()
    data = LlamaDataConfig(
        data=(str(write_documents(documents)),),
        cache_dir=directory / "cache",
        sequence_length=16,
        batch_size=8,
        validation_batches=2,
    )
    config = TrainConfig(
        LlamaTask(MODEL, data),
        OptimizerConfig(learning_rate=3e-2),
        steps=8,
        log_every=8,
        eval_every=8,
        checkpoint_every=8,
        mesh=(1, 1, 1),
    )
    train(config, directory / "pretrained")
    table = directory / "rows.csv"
    lines = [f"{'weight ' * (i % 7)}{i},{i % max(labels, 2)}" for i in range(80)]
    table.write_text("\n".join(["text,label", *lines]) + "\n")
    data = DataConfig(
        data=(str(table),),
        metrics=("pearson",) if labels == 1 else ("accuracy",),
        sequence_length=16,
        batch_size=8,
    )
    task = ClassificationTask(MODEL, HeadConfig(labels), data)
    config = replace(config, task=task, from_run=directory / "pretrained")
    train(config, directory / "run")
    return directory / "run"


@pytest.mark.parametrize("labels", [1, 3])
def test_logits_match_transformers(labels, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra [parity]")
    transformers = pytest.importorskip("transformers", reason="needs [parity]")
    run_dir = fine_tune(tmp_path, labels)
    # The export does not need the pretrained run.
    (tmp_path / "pretrained").rename(tmp_path / "elsewhere")
    export(Source(run_dir), tmp_path / "out")
    task, _, params = load_trained(Source(run_dir), ClassificationTask)
    vocabulary = read_vocabulary(
        "run_dir", run_dir / "tokenizer.json", "<|endoftext|>", MODEL.vocab_size
    )
    rows = [Row((text,), "0") for text in TEXTS]
    names = [str(i) for i in range(labels)] if labels > 1 else []
    examples, _ = make_examples(rows, names, vocabulary, task.task.data)
    _, outputs = task.task.evaluate(params, examples)

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out"
    )
    assert type(model).__name__ == "LlamaForSequenceClassification"
    tokens = torch.tensor(examples["tokens"].astype(np.int64))
    with torch.no_grad():
        batch = model(input_ids=tokens).logits.numpy()
    np.testing.assert_allclose(outputs["logits"], batch, rtol=0, atol=1e-4)
    assert np.abs(batch).max() > 0.1
    # Tokenize one text at a time, as a user would.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, expected in zip(TEXTS[:2], batch[:2]):
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits.numpy()
        np.testing.assert_allclose(alone[0], expected, rtol=0, atol=1e-4)


def test_exported_config(tmp_path):
    run_dir = fine_tune(tmp_path, 3)
    export(Source(run_dir), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1", "2": "2"}
    assert config["pad_token_id"] == config["eos_token_id"]
    with pytest.raises(InputError, match="is not empty"):
        export(Source(run_dir), tmp_path / "out")
