"""A Llama that classifies: its body, and a layer on the last token."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import ModelConfig
from examples.llama.model import Body

_INIT = nnx.initializers.normal(0.02)


class Classifier(Body):
    """Maps a text to a score for each label, or to a number."""

    def __init__(self, config: ModelConfig, num_labels: int, rngs: nnx.Rngs):
        """Draws every weight from ``rngs``."""
        super().__init__(config, rngs)
        self.score = nnx.Linear(
            config.hidden_size,
            num_labels,
            use_bias=False,
            kernel_init=_INIT,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array, last: jax.Array) -> jax.Array:
        """Maps ``[B, T]`` to logits in float32, ``[B, num_labels]``.

        Args:
            tokens: integers; what follows the last token has no effect.
            last: the position of the last token of each text, ``[B]``.
        """
        features, _ = self.features(tokens)
        at_last = features[jnp.arange(len(tokens)), last]
        return self.score(at_last.astype(jnp.float32))


def make_graphdef(config: ModelConfig, num_labels: int) -> nnx.GraphDef[Classifier]:
    """Makes the model without its parameters."""
    return nnx.graphdef(
        nnx.eval_shape(lambda: Classifier(config, num_labels, nnx.Rngs(0)))
    )
