"""The metrics of GLUE, computed by scikit-learn and SciPy."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from examples.glue.config import Score

_SCORES: Mapping[Score, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda labels, chosen: f1_score(labels, chosen, zero_division=0.0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, numbers: pearsonr(labels, numbers).statistic,
    "spearman": lambda labels, numbers: spearmanr(labels, numbers).statistic,
}


def scores(
    metrics: Sequence[Score], logits: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Compute metrics of predictions.

    Args:
        metrics: names of the metrics.
        logits: ``[N, num_labels]``; a single column holds the predicted numbers.
        labels: the true classes or numbers, ``[N]``.

    Returns:
        The scores by name. A correlation with a constant is 0.
    """
    is_regression = logits.shape[-1] == 1
    predicted = logits[:, 0] if is_regression else logits.argmax(-1)
    with warnings.catch_warnings():
        # SciPy warns about constant input and returns NaN.
        warnings.simplefilter("ignore")
        found = {name: float(_SCORES[name](labels, predicted)) for name in metrics}
    return {name: x if np.isfinite(x) else 0.0 for name, x in found.items()}
