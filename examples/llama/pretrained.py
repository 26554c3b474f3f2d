"""Loading of pretrained Llamas and their tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.llama.config import TOKENIZER_NAME
from examples.llama.data.tokenizer import (
    DOCUMENTS_AT_ONCE,
    encode,
    load_tokenizer,
    text_size,
)
from examples.llama.task import LlamaTask
from examples.llama.transformers_files import Pretrained, open_huggingface
from examples.training.checkpoint import CHECKPOINTS_NAME
from examples.training.checks import read_text, require
from examples.training.config import from_json
from examples.training.run_dir import CONFIG_NAME
from examples.training.task import Params
from examples.training.trained import Source, load_trained, require_checkpoint


def open_pretrained(source: Path) -> Pretrained:
    """Open a run of this program or a model in Hugging Face's format.

    Raises:
        InputError: if the source is neither, or its architecture is not supported.
    """
    if not (source / CHECKPOINTS_NAME).is_dir():
        return open_huggingface(source)
    require_checkpoint("from", source)
    path = source / CONFIG_NAME
    task = from_json(read_text("from", path), f"from: {path}", LlamaTask).task
    tokenizer = source / TOKENIZER_NAME
    require(tokenizer.is_file(), f"from: {tokenizer} does not exist.")

    def load_params() -> Params:
        return load_trained(Source(source), LlamaTask, "from").params

    end = task.data.end_of_document
    return Pretrained(task.model, load_params, tokenizer, end, end)


class Vocabulary(NamedTuple):
    """The tokenizer of a pretrained model."""

    tokenizer: Tokenizer
    start_of_document: str
    """The special token before each document."""
    size: int
    """Vocabulary size of the model."""

    @property
    def start(self) -> Any:
        """Id of the token before each document."""
        return self.tokenizer.token_to_id(self.start_of_document)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenize each text separately, without special tokens."""
        parts: list[np.ndarray] = []
        with tqdm(total=len(texts), desc="Tokenizing", unit="text", leave=False) as bar:
            for at in range(0, len(texts), DOCUMENTS_AT_ONCE):
                some = list(texts[at : at + DOCUMENTS_AT_ONCE])
                # ``encode`` puts this token only at the end of each text.
                stream = encode(some, self.tokenizer, self.start_of_document)
                ends = np.flatnonzero(stream == self.start)
                parts += [part[:-1] for part in np.split(stream, ends + 1)[:-1]]
                bar.update(len(some))
        return parts


def read_vocabulary(
    setting: str, tokenizer: Path, start_of_document: str, size: int
) -> Vocabulary:
    """Read the tokenizer of a pretrained model.

    Args:
        setting: the setting that names the model, for error messages.
        tokenizer: the tokenizer.json.
        start_of_document: the special token before each document.
        size: vocabulary size of the model.

    Raises:
        InputError: if the tokenizer cannot be read, lacks the special token, or has
            more tokens than the model.
    """
    require(tokenizer.is_file(), f"{setting}: {tokenizer} does not exist.")
    loaded = load_tokenizer(str(tokenizer))
    require(
        loaded.token_to_id(start_of_document) is not None,
        f"{setting}: {tokenizer} has no token {start_of_document!r}.",
    )
    count = text_size(loaded, start_of_document)
    require(
        count <= size,
        f"{setting}: {tokenizer} has {count} tokens, but the model's vocab_size is "
        f"{size}.",
    )
    return Vocabulary(loaded, start_of_document, size)
