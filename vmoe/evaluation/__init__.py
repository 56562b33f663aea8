"""Evaluation: classification, zero-shot, retrieval, and the `eval.py` command."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.evaluation.classification import evaluate_classification
    from vmoe.evaluation.retrieval import evaluate_retrieval
    from vmoe.evaluation.zero_shot import evaluate_zero_shot, zero_shot_classify

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "vmoe.evaluation.classification": "evaluate_classification",
        "vmoe.evaluation.retrieval": "evaluate_retrieval",
        "vmoe.evaluation.zero_shot": "evaluate_zero_shot zero_shot_classify",
    },
)
