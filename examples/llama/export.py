"""The command that exports a trained model in Hugging Face's format.

``python -m examples.llama export --run-dir DIR --output-dir OUT`` writes a directory
from which ``transformers``, or any other program that reads this format, can load a
``LlamaForCausalLM`` and its tokenizer.
"""

from pathlib import Path

from examples.llama.generate import Run, load_run
from examples.llama.transformers_files import save_tokenizer, to_config, to_tensors
from examples.training.checks import make_directory
from examples.training.safetensors_files import (
    require_empty,
    save_json,
    save_tensors,
)
from examples.training.trained import Source


def save_run(run: Run, directory: Path) -> None:
    """Save the model and the tokenizer of a run to a directory."""
    save_tensors(to_tensors(run.params), directory)
    data = run.task.data
    head = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    config = to_config(run.task.model, data.sequence_length, run.end)
    save_json({**config, **head}, directory / "config.json")
    save_tokenizer(
        run.tokenizer.to_str(), data.end_of_document, data.sequence_length, directory
    )


def export(source: Source, output_dir: Path) -> None:
    """Export a trained model in Hugging Face's format.

    Args:
        source: where the parameters come from.
        output_dir: the directory to write to, new or empty.
    """
    require_empty(output_dir)
    run = load_run(source)
    make_directory("output_dir", output_dir)
    save_run(run, output_dir)
    print(f"Wrote the model of step {run.step} to {output_dir}.")
