"""Rematerialization: what the backward pass keeps, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import jax

from examples.training.attention import SAVED

Remat = Literal["none", "dots", "full"]

_F = TypeVar("_F", bound=Callable[..., Any])


def rematerialize(block: _F, remat: Remat) -> _F:
    """Choose what the backward pass keeps of a block of layers in a scan.

    Args:
        block: a function that computes the block.
        remat: ``"none"`` keeps everything except kernels that are cast and gathered,
            which every device would otherwise hold for all layers at once; ``"dots"``
            keeps the outputs of projections and attention; ``"full"`` only the inputs.
    """
    policies = jax.checkpoint_policies
    policy = {
        "none": _all_but_gathered,
        "dots": policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_from_both_policies(
                policies.save_only_these_names(SAVED), _outputs_of_cudnn
            ),
        ),
        "full": None,
    }[remat]
    # Inside a scan, CSE cannot undo the rematerialization.
    return cast(_F, jax.checkpoint(block, prevent_cse=False, policy=policy))


def _outputs_of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    # Its softmax statistics, which the backward pass needs too, have no name.
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("sharding_constraint", "convert_element_type")
