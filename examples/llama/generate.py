"""The command that generates text with a trained model.

``python -m examples.llama generate --run-dir DIR --prompt "def "`` continues the prompt
with the model of the run in DIR. ``--help`` lists all options.
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
    """A trained model with its tokenizer and settings."""

    task: LlamaTask
    tokenizer: Tokenizer
    end: int
    """The end-of-document token."""
    step: int
    params: Params
    """The parameters, in host memory."""


@dataclass(frozen=True)
class Sampling:
    """Settings for sampling the next token.

    The logits are divided by the temperature, then filtered by ``top_k``, then by
    ``top_p``.
    """

    temperature: float = 1.0
    """Divisor of the logits: values below 1 favor likely tokens. 0: greedy decoding."""
    top_k: int | None = 50
    """Sample from this many of the most likely tokens. None: from all tokens."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with at least this total
    probability."""

    def __post_init__(self) -> None:
        """Validate the settings."""
        require(
            0 <= self.temperature < float("inf"),
            f"temperature must be finite and at least 0, got {self.temperature}.",
        )
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k must be at least 1, got {self.top_k}.",
        )
        require(
            0 < self.top_p <= 1,
            f"top_p must be above 0 and at most 1, got {self.top_p}.",
        )


# Runs


def load_run(source: Source) -> Run:
    """Load the parameters and the tokenizer of a run.

    Raises:
        InputError: if the run, the checkpoint or a usable tokenizer is missing.
    """
    config, step, params = load_trained(source, LlamaTask)
    tokenizer_file = source.run_dir / TOKENIZER_NAME
    require(tokenizer_file.is_file(), f"run_dir: {tokenizer_file} does not exist.")
    tokenizer = load_tokenizer(str(tokenizer_file))
    end = tokenizer.token_to_id(config.task.data.end_of_document)
    if end is None:
        raise InputError(
            f"run_dir: {tokenizer_file} has no token "
            f"{config.task.data.end_of_document!r}."
        )
    return Run(config.task, tokenizer, end, step, params)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Set all but the ``k`` largest logits of each row to minus infinity.

    Logits equal to the ``k``-th largest are kept too.
    """
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits >= largest[..., -1:], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Set all but the most likely tokens of each row to minus infinity.

    Keep the fewest largest logits whose softmax adds up to at least ``p``, and those
    equal to the smallest of them.

    Reference: Holtzman et al., arXiv:1904.09751.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    # The total probability of the larger logits, 0 for the first, which is always kept.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.min(ordered, axis=-1, where=before < p, initial=jnp.inf, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)


def draw(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Sample a token from each row of logits, ``[B, V]`` to ``[B]``."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits)


class _Loop(NamedTuple):
    """The state of the decoding loop."""

    drawn: jax.Array
    """Number of tokens sampled so far for each text."""
    tokens: jax.Array
    """``[B, count]``, of which the first ``drawn`` are sampled."""
    cache: Cache
    """Keys and values of all tokens before the last sampled one."""


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
    """Sample continuations of a prompt.

    Args:
        config: the model.
        params: its parameters.
        prompt: at least one token, ``[T]``.
        key: the random key.
        end: the end-of-document token.
        count: how many tokens to sample.
        samples: how many independent continuations to sample.
        sampling: how to sample the tokens.

    Returns:
        Integers, ``[samples, count]``. Every token after the first ``end`` is ``end``.
    """
    graphdef = make_graphdef(config)

    def decode(tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits, cache = nnx.merge(graphdef, params).decode(tokens, cache)
        return logits[:, -1], cache

    # The last token is sampled but never fed to the model.
    cache = make_cache(config, 1, len(prompt) + count - 1)
    logits, cache = decode(prompt[None], cache)
    keys, values = (jnp.repeat(x, samples, axis=1) for x in cache[:2])
    cache = Cache(keys, values, cache.length)
    logits = jnp.repeat(logits, samples, axis=0)
    first = draw(logits, sampling, jax.random.fold_in(key, 0))
    tokens = jnp.full((samples, count), end).at[:, 0].set(first)

    def should_continue(loop: _Loop) -> jax.Array:
        ended = loop.tokens[:, loop.drawn - 1] == end
        return (loop.drawn < count) & ~jnp.all(ended)

    def step(loop: _Loop) -> _Loop:
        last = loop.tokens[:, loop.drawn - 1]
        logits, cache = decode(last[:, None], loop.cache)
        new = draw(logits, sampling, jax.random.fold_in(key, loop.drawn))
        new = jnp.where(last == end, end, new)
        return _Loop(loop.drawn + 1, loop.tokens.at[:, loop.drawn].set(new), cache)

    loop = _Loop(jnp.int32(1), tokens, cache)
    return jax.lax.while_loop(should_continue, step, loop).tokens


# Text


def encode_prompt(prompt: str, run: Run) -> np.ndarray:
    """Tokenize a prompt; an empty one becomes the end-of-document token."""
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
    """Generate texts that start with a prompt and stop at the end of the document.

    Args:
        run: the model.
        prompt: the start of each text.
        tokens: the maximum number of new tokens. None: 200, or as many as fit in the
            model's training sequence length.
        sampling: how to sample the tokens.
        samples: how many texts to generate.
        seed: the random seed.

    Returns:
        The texts, each including the prompt.

    Raises:
        InputError: if the text could exceed the model's training sequence length.
    """
    encoded = encode_prompt(prompt, run)
    length = run.task.data.sequence_length
    room = length - len(encoded)
    require(
        room > 0,
        f"prompt has {len(encoded)} tokens, but the model was trained on sequences of "
        f"{length}; shorten it.",
    )
    tokens = min(_TOKENS, room) if tokens is None else tokens
    for name, value in (("tokens", tokens), ("samples", samples)):
        require_positive(name, value)
    require(
        tokens <= room,
        f"tokens ({tokens}) and the {len(encoded)} of the prompt exceed the sequences "
        f"of {length} that the model was trained on; pass --tokens {room} or fewer.",
    )
    require(0 <= seed < 2**32, f"seed must be at least 0 and below 2**32, got {seed}.")
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
    # Decoding drops special tokens, including the end of the document.
    return [run.tokenizer.decode([*encoded.tolist(), *row]) for row in drawn.tolist()]


def generate(
    source: Source,
    prompt: str = "",
    tokens: int | None = None,
    sampling: Sampling = Sampling(),
    samples: int = 1,
    seed: int = 0,
) -> None:
    """Generate text from a prompt with a trained model.

    Args:
        source: where the parameters come from.
        prompt: the start of the text. Empty: start a new document.
        tokens: the maximum number of new tokens. None: 200, or as many as fit in the
            model's training sequence length.
        sampling: how to sample the tokens.
        samples: how many texts to generate.
        seed: the random seed.
    """
    run = load_run(source)
    texts = continue_prompt(run, prompt, tokens, sampling, samples, seed)
    for i, text in enumerate(texts, 1):
        if samples > 1:
            print(f"--- {i} of {samples} ---")
        print(text)
