"""The command that writes text with a trained model.

``python -m examples.llama generate --run-dir DIR --prompt "def "`` goes on with the
prompt as the run in DIR has learned to. ``--help`` lists all options.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from examples.llama.config import TOKENIZER_NAME, ModelConfig
from examples.llama.data.tokenizer import encode, load_tokenizer
from examples.llama.model import Cache, make_cache, make_graphdef
from examples.llama.task import LlamaTask
from examples.training.checks import InputError, require, require_positive
from examples.training.task import Params
from examples.training.trained import Source, load_trained

_TOKENS = 200


class Run(NamedTuple):
    """A model that was trained, and what it was trained with."""

    task: LlamaTask
    tokenizer: Tokenizer
    end: int
    """The token that ends a document."""
    step: int
    params: Params
    """In the host's memory."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    The logits are divided by the temperature, then the ``top_k`` are kept, then of
    these the ``top_p``.
    """

    temperature: float = 1.0
    """What the logits are divided by: below 1, likely tokens become more likely still.
    0 takes the most likely one always."""
    top_k: int | None = 50
    """How many of the most likely tokens to choose from. None: all."""
    top_p: float = 1.0
    """Choose from the fewest most likely tokens that have this probability together."""

    def __post_init__(self) -> None:
        """Checks the values."""
        require(
            0 <= self.temperature < float("inf"),
            f"temperature is {self.temperature}: it has to be at least 0",
        )
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k is {self.top_k}: it has to be at least 1",
        )
        require(
            0 < self.top_p <= 1,
            f"top_p is {self.top_p}: it has to be above 0 and at most 1",
        )


# Runs


def load_run(source: Source) -> Run:
    """Loads the parameters and the tokenizer of a run.

    Raises:
        InputError: where there is no run, or not that checkpoint.
    """
    config, step, params = load_trained(source, LlamaTask)
    tokenizer_file = source.run_dir / TOKENIZER_NAME
    require(tokenizer_file.is_file(), f"run_dir: there is no {tokenizer_file}")
    tokenizer = load_tokenizer(str(tokenizer_file))
    end = tokenizer.token_to_id(config.task.data.end_of_document)
    if end is None:
        raise InputError(
            f"run_dir: {tokenizer_file} has no token "
            f"{config.task.data.end_of_document!r}"
        )
    return Run(config.task, tokenizer, end, step, params)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the ``k`` largest of each row to minus infinity.

    Those that equal the last of the ``k`` stay, too.
    """
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits >= largest[..., -1:], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest largest whose softmax adds up to ``p``, or more.

    The others become minus infinity. Those that equal the last one kept stay, too.

    Reference: Holtzman et al., arXiv:1904.09751.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    # What the larger ones have together. The first has none before it, and is kept.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.min(ordered, axis=-1, where=before < p, initial=jnp.inf, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)


def draw(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draws a token from each row of logits, ``[B, V]`` to ``[B]``."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits)


class _Loop(NamedTuple):
    """What changes from token to token."""

    drawn: jax.Array
    """How many tokens of each text are drawn so far."""
    tokens: jax.Array
    """``[B, count]``, of which the first ``drawn`` are drawn."""
    cache: Cache
    """The keys and values of all tokens before the last one drawn."""


@partial(jax.jit, static_argnames=("config", "end", "count", "samples", "sampling"))
def generate_tokens(
    config: ModelConfig,
    params: Params,
    prompt: jax.Array,
    key: jax.Array,
    *,
    end: int,
    count: int,
    samples: int = 1,
    sampling: Sampling = Sampling(),
) -> jax.Array:
    """Draws tokens that follow a prompt.

    Args:
        config: the model.
        params: its parameters.
        prompt: at least one token, ``[T]``.
        key: of the random numbers.
        end: the token that ends a document.
        count: how many tokens to draw.
        samples: how many times, independently.
        sampling: how.

    Returns:
        Integers, ``[samples, count]``. After an ``end`` there is nothing but ``end``.
    """
    graphdef = make_graphdef(config)

    def decode(tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = nnx.merge(graphdef, params).decode(tokens, cache)
        return logits[:, -1], cache

    # The last token is drawn, and not run.
    cache = make_cache(config, 1, len(prompt) + count - 1)
    logits, cache = decode(prompt[None], cache)
    keys, values = (jnp.repeat(x, samples, axis=1) for x in cache[:2])
    cache = Cache(keys, values, cache.length)
    logits = jnp.repeat(logits, samples, axis=0)
    first = draw(logits, sampling, jax.random.fold_in(key, 0))
    tokens = jnp.full((samples, count), end).at[:, 0].set(first)

    def goes_on(loop: _Loop) -> jax.Array:
        ended = loop.tokens[:, loop.drawn - 1] == end
        return (loop.drawn < count) & ~jnp.all(ended)

    def step(loop: _Loop) -> _Loop:
        last = loop.tokens[:, loop.drawn - 1]
        logits, cache = decode(last[:, None], loop.cache)
        new = draw(logits, sampling, jax.random.fold_in(key, loop.drawn))
        new = jnp.where(last == end, end, new)
        return _Loop(loop.drawn + 1, loop.tokens.at[:, loop.drawn].set(new), cache)

    return jax.lax.while_loop(goes_on, step, _Loop(jnp.int32(1), tokens, cache)).tokens


# Text


def encode_prompt(prompt: str, run: Run) -> np.ndarray:
    """Tokenizes a prompt; an empty one becomes the end of the document before."""
    ended = encode([prompt], run.tokenizer, run.task.data.end_of_document)
    return ended[:-1] if len(ended) > 1 else ended


def continue_prompt(
    run: Run,
    prompt: str,
    tokens: int | None = None,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    seed: int = 0,
) -> list[str]:
    """Writes texts that begin with a prompt, and end where the document does.

    Args:
        run: the model.
        prompt: how each text begins.
        tokens: how many to add at most. Not given: 200, or what the length of the
            model's training sequences leaves.
        sampling: how the tokens are drawn.
        samples: how many texts to write.
        seed: of the random numbers.

    Raises:
        InputError: for more tokens than the model's training sequences had.
    """
    encoded = encode_prompt(prompt, run)
    length = run.task.data.sequence_length
    room = length - len(encoded)
    require(
        room > 0,
        f"prompt: it has {len(encoded)} tokens, and the model was trained on sequences "
        f"of {length}; shorten it",
    )
    tokens = min(_TOKENS, room) if tokens is None else tokens
    for name, value in (("tokens", tokens), ("samples", samples)):
        require_positive(name, value)
    require(
        tokens <= room,
        f"tokens is {tokens}: with the prompt's {len(encoded)} that is beyond the "
        f"sequences of {length} that the model was trained on; choose --tokens {room} "
        "or fewer",
    )
    require(
        0 <= seed < 2**32, f"seed is {seed}: it has to be at least 0 and below 2**32"
    )
    drawn = generate_tokens(
        run.task.model,
        run.params,
        jnp.asarray(encoded, jnp.int32),
        jax.random.key(seed),
        end=run.end,
        count=tokens,
        samples=samples,
        sampling=sampling,
    )
    # The decoder leaves out special tokens, so the end of the document, too.
    return [run.tokenizer.decode([*encoded.tolist(), *row]) for row in drawn.tolist()]


def generate(
    source: Source,
    prompt: str = "",
    tokens: int | None = None,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    seed: int = 0,
) -> None:
    """Go on with a prompt as a model has learned to.

    Args:
        source: where the parameters come from.
        prompt: how the text begins. Empty: as documents do.
        tokens: how many to add at most. Not given: 200, or what the length of the
            model's training sequences leaves.
        sampling: how the tokens are drawn.
        samples: how many texts to write.
        seed: of the random numbers.
    """
    run = load_run(source)
    texts = continue_prompt(run, prompt, tokens, sampling, samples, seed)
    for i, text in enumerate(texts, 1):
        if samples > 1:
            print(f"--- {i} of {samples} ---")
        print(text)
