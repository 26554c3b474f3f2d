"""The command that exports a fine-tuned model in Hugging Face's format.

``python -m examples.glue export --run-dir DIR --output-dir OUT`` writes a directory
from which ``transformers`` loads a ``LlamaForSequenceClassification`` and its
tokenizer.
"""

from pathlib import Path
from typing import Any

from examples.glue.data import read_labels
from examples.glue.task import ClassificationTask
from examples.llama.config import TOKENIZER_NAME
from examples.llama.pretrained import read_vocabulary
from examples.llama.transformers_files import save_tokenizer, to_config, to_tensors
from examples.training.checks import make_directory, read_text
from examples.training.safetensors_files import (
    require_empty,
    save_json,
    save_tensors,
)
from examples.training.trained import Source, load_trained


def export(source: Source, output_dir: Path) -> None:
    """Export a fine-tuned model in Hugging Face's format.

    The model expects the same input as in training: the start-of-document token before
    each text (also before the second text of a pair), and padding on the right with the
    same token.

    Args:
        source: the checkpoint to export.
        output_dir: the directory to write to, new or empty.
    """
    require_empty(output_dir)
    config, step, params = load_trained(source, ClassificationTask)
    model = config.task.model
    names, start_of_document = read_labels("run_dir", source.run_dir)
    tokenizer = source.run_dir / TOKENIZER_NAME
    vocabulary = read_vocabulary(
        "run_dir", tokenizer, start_of_document, model.vocab_size
    )
    make_directory("output_dir", output_dir)
    tensors = to_tensors(params)
    tensors["score.weight"] = params["score"]["kernel"].T
    save_tensors(tensors, output_dir)
    length = config.task.data.sequence_length
    head: dict[str, Any] = {
        "architectures": ["LlamaForSequenceClassification"],
        "pad_token_id": vocabulary.start,
    }
    if names:
        head["id2label"] = {str(i): name for i, name in enumerate(names)}
        head["label2id"] = {name: i for i, name in enumerate(names)}
    else:
        head |= {"num_labels": 1, "problem_type": "regression"}
    save_json(
        {**to_config(model, length, vocabulary.start), **head},
        output_dir / "config.json",
    )
    text = read_text("run_dir", tokenizer)
    save_tokenizer(text, start_of_document, length, output_dir)
    print(f"Wrote the model of step {step} to {output_dir}.")
