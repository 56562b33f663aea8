"""Corruption errors on ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261, section 4)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from vmoe.data.sources.imagenet import CORRUPTIONS, SEVERITIES

# AlexNet's top-1 errors, the mean over the five severities, as the authors publish them for the mean corruption error.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def corruption_errors(errors: Mapping[str, float]) -> dict[str, float]:
    """Corruption errors: a model's mean error over the five severities, divided by AlexNet's. 1 is as bad as AlexNet.

    `errors` are {"CORRUPTION/SEVERITY": top-1 error in 0..1}. Returns {corruption: its error} for those of the 15 that
    have all five severities, and "mce", their mean, if all 15 have. Papers give them in percent.
    """
    missing = {condition.partition("/")[0] for condition in missing_conditions(errors)}
    result = {}
    for corruption in CORRUPTIONS:
        if corruption not in missing:
            mean = statistics.fmean(errors[f"{corruption}/{severity}"] for severity in SEVERITIES)
            result[corruption] = mean / ALEXNET_ERRORS[corruption]
    if not missing:
        result["mce"] = statistics.fmean(result.values())
    return result


def missing_conditions(errors: Mapping[str, float]) -> list[str]:
    """The benchmark's 75 conditions, as "fog/3", that are not in `errors`; without them there is no "mce"."""
    conditions = (f"{corruption}/{severity}" for corruption in CORRUPTIONS for severity in SEVERITIES)
    return [condition for condition in conditions if condition not in errors]
