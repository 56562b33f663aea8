"""Evaluation: classification, zero-shot, retrieval, and the `eval.py` command."""

from vmoe.evaluation.classification import evaluate_classification
from vmoe.evaluation.retrieval import evaluate_retrieval
from vmoe.evaluation.zero_shot import evaluate_zero_shot, zero_shot_classify

__all__ = ["evaluate_classification", "evaluate_retrieval", "evaluate_zero_shot", "zero_shot_classify"]
