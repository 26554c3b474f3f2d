"""A Llama classifier: its body, and a linear layer on the last token."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import ModelConfig
from examples.llama.model import Body

_INIT = nnx.initializers.normal(0.02)


class Classifier(Body):
    """A Llama that maps a text to a logit per label, or to a number."""

    def __init__(self, config: ModelConfig, num_labels: int, rngs: nnx.Rngs):
        """Initialize the parameters from ``rngs``."""
        super().__init__(config, rngs)
        self.score = nnx.Linear(
            config.hidden_size,
            num_labels,
            use_bias=False,
            kernel_init=_INIT,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array, last: jax.Array) -> jax.Array:
        """Map tokens, ``[B, T]``, to logits in float32, ``[B, num_labels]``.

        Args:
            tokens: integers; tokens after position ``last`` have no effect.
            last: position of the last token of each text, ``[B]``.
        """
        features, _ = self.features(tokens)
        at_last = features[jnp.arange(len(tokens)), last]
        return self.score(at_last.astype(jnp.float32))


def make_graphdef(config: ModelConfig, num_labels: int) -> nnx.GraphDef[Classifier]:
    """Build the graph definition of the model, without parameters."""
    return nnx.graphdef(
        nnx.eval_shape(lambda: Classifier(config, num_labels, nnx.Rngs(0)))
    )
