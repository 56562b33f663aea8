import pytest

from vmoe.data.sources.imagenet import CORRUPTIONS
from vmoe.evaluation.robustness import ALEXNET_ERRORS, corruption_errors, missing_conditions


def all_errors(scale=1.0):
    return {f"{name}/{severity}": scale * ALEXNET_ERRORS[name] for name in CORRUPTIONS for severity in range(1, 6)}


def test_the_denominators_are_the_published_ones():
    assert list(ALEXNET_ERRORS) == list(CORRUPTIONS)
    # Each is a number of mistakes on 5 x 50,000 images, which a wrong digit would not be (three in four times).
    mistakes = [error * 250_000 for error in ALEXNET_ERRORS.values()]
    assert mistakes == pytest.approx([round(number) for number in mistakes], abs=1e-6)
    percent = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.65]
    assert [100 * error for error in ALEXNET_ERRORS.values()] == pytest.approx(percent, abs=0.051)


def test_alexnet_itself_has_1_and_half_its_errors_give_a_half():
    for scale in (1.0, 0.5):
        found = corruption_errors(all_errors(scale))
        assert list(found) == [*CORRUPTIONS, "mce"]
        assert found == pytest.approx(dict.fromkeys(found, scale))


def test_the_error_is_that_of_the_mean_over_severities():
    errors = all_errors()
    errors.update({f"fog/{severity}": 0.1 * severity for severity in range(1, 6)})
    found = corruption_errors(errors)
    assert found["fog"] == pytest.approx(0.3 / 0.819324)
    assert found["mce"] == pytest.approx((14 + 0.3 / 0.819324) / 15)


def test_without_all_75_conditions_there_is_no_mean():
    errors = all_errors()
    del errors["snow/4"], errors["pixelate/1"]
    found = corruption_errors(errors)
    assert "mce" not in found
    assert "snow" not in found
    assert len(found) == 13
    assert missing_conditions(errors) == ["snow/4", "pixelate/1"]
    assert missing_conditions(all_errors()) == []


def test_the_further_corruptions_do_not_count():
    extra = {f"spatter/{severity}": 1.0 for severity in range(1, 6)}
    assert corruption_errors(all_errors() | extra) == corruption_errors(all_errors())
