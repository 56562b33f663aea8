"""Evaluation: classification, zero-shot, retrieval, and the `eval.py` command."""

from typing import TYPE_CHECKING

from vmoe.utils.lazy import lazy_names

if TYPE_CHECKING:
    from vmoe.evaluation.classification import evaluate_classification
    from vmoe.evaluation.retrieval import evaluate_retrieval
    from vmoe.evaluation.zero_shot import evaluate_zero_shot, zero_shot_classify

__all__ = ["evaluate_classification", "evaluate_retrieval", "evaluate_zero_shot", "zero_shot_classify"]

__getattr__ = lazy_names(
    __name__,
    {
        "evaluate_classification": "vmoe.evaluation.classification",
        "evaluate_retrieval": "vmoe.evaluation.retrieval",
        "evaluate_zero_shot": "vmoe.evaluation.zero_shot",
        "zero_shot_classify": "vmoe.evaluation.zero_shot",
    },
)
