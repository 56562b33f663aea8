import dataclasses

import pytest

from vmoe.planning.hardware import HARDWARE, LATENCY, LINK_EFFICIENCY, Hardware, pick_hardware
from vmoe.utils.config import ConfigError

# Links of 100 and 10 GB/s.
EXACT = Hardware(1, 1, 1, 1, 100 / LINK_EFFICIENCY, 10 / LINK_EFFICIENCY)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_machine_is_complete(name):
    hardware = pick_hardware(name, {})
    assert 0 < hardware.usable < hardware.memory * 2**30
    assert hardware.half_tflops >= hardware.float32_tflops


def test_a_users_numbers_win():
    assert pick_hardware("a100", {"memory": 40}) == dataclasses.replace(HARDWARE["a100"], memory=40)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tpu", {}, "--gpu must be one of a100.*got 'tpu'"),
        ("h100", {"memory": 0.0}, "hardware.memory must be a number > 0, got 0"),
        ("h100", {"memory": "much"}, "hardware.memory must be a number > 0, got 'much'"),
        ("h100", {"speed": 1.0}, "unknown key 'hardware.speed'; known keys: memory"),
    ],
)
def test_numbers_out_of_range(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        pick_hardware(name, changes)


def test_a_ring_inside_a_machine_and_between_machines():
    # Four members of one machine: each receives three quarters of 8 GB through its own link of 100 GB/s.
    assert EXACT.gather(8e9, range(4), per_node=4) == pytest.approx(8 * 3 / 4 / 100 + LATENCY)
    # Eight on two machines: half of it comes from the other machine, through four adapters of 10 GB/s together.
    assert EXACT.gather(8e9, range(8), per_node=4) == pytest.approx(8 / 2 / 4 / 10 + LATENCY)
    # One member on each of two machines: a single adapter.
    assert EXACT.gather(8e9, [0, 4], per_node=4) == pytest.approx(8 / 2 / 10 + LATENCY)
    assert EXACT.gather(8e9, [0], per_node=4) == 0


def test_an_exchange_is_as_slow_as_its_slowest_link():
    assert EXACT.exchange(8e9, range(4), per_node=4) == pytest.approx(8 * 3 / 4 / 100 + LATENCY)
    assert EXACT.exchange(8e9, range(8), per_node=4) == pytest.approx(8 * 4 / 8 / 10 + LATENCY)
    assert EXACT.exchange(8e9, range(1), per_node=4) == 0
