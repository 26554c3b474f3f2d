"""The loader of Llamas that were trained before, and of their tokenizers."""

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
from examples.training.checks import InputError, read_text, require
from examples.training.config import from_json
from examples.training.run_dir import CONFIG_NAME
from examples.training.task import Params
from examples.training.trained import Source, load_trained


def open_pretrained(source: Path) -> Pretrained:
    """Finds a run of this program, or a directory in Hugging Face's format.

    Raises:
        InputError: for anything else, or a Llama that differs from the one here.
    """
    if not (source / CHECKPOINTS_NAME).is_dir():
        return open_huggingface(source)
    path = source / CONFIG_NAME
    task = from_json(read_text("from", path), f"from: {path}", LlamaTask).task
    tokenizer = source / TOKENIZER_NAME
    require(tokenizer.is_file(), f"from: there is no {tokenizer}")

    def load_params() -> Params:
        try:
            return load_trained(Source(source), LlamaTask).params
        except InputError as error:
            why = str(error).removeprefix("run_dir: ")
            raise InputError(f"from: {why}") from error

    end = task.data.end_of_document
    return Pretrained(task.model, load_params, tokenizer, end, end)


class Vocabulary(NamedTuple):
    """A tokenizer as it was used in pretraining."""

    tokenizer: Tokenizer
    start_of_document: str
    """The special token before each document."""
    size: int
    """Tokens that the model knows."""

    @property
    def start(self) -> Any:
        """The token before each document."""
        return self.tokenizer.token_to_id(self.start_of_document)

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenizes texts, each by itself, without special tokens."""
        parts: list[np.ndarray] = []
        with tqdm(total=len(texts), desc="Tokenizing", unit="text", leave=False) as bar:
            for at in range(0, len(texts), DOCUMENTS_AT_ONCE):
                some = list(texts[at : at + DOCUMENTS_AT_ONCE])
                # ``encode`` ends each text with this token, and removes it elsewhere.
                stream = encode(some, self.tokenizer, self.start_of_document)
                ends = np.flatnonzero(stream == self.start)
                parts += [part[:-1] for part in np.split(stream, ends + 1)[:-1]]
                bar.update(len(some))
        return parts


def read_vocabulary(tokenizer: Path, start_of_document: str, size: int) -> Vocabulary:
    """Reads the tokenizer of a pretrained model.

    Args:
        tokenizer: the tokenizer.json.
        start_of_document: the special token before each document.
        size: tokens that the model knows.

    Raises:
        InputError: where it cannot be read, or has more tokens.
    """
    require(tokenizer.is_file(), f"from: there is no {tokenizer}")
    loaded = load_tokenizer(str(tokenizer))
    require(
        loaded.token_to_id(start_of_document) is not None,
        f"from: {tokenizer} has no token {start_of_document!r}",
    )
    count = text_size(loaded, start_of_document)
    require(
        count <= size,
        f"from: {tokenizer} has {count} tokens, and the model knows {size}",
    )
    return Vocabulary(loaded, start_of_document, size)
