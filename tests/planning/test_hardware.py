import pytest

from vmoe.planning.hardware import HARDWARE, Hardware, Links, pick_hardware
from vmoe.utils.config import ConfigError

EXACT = Hardware(1, 1, 1, 1, 100, 10, link_efficiency=1.0, latency=0.0)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_machine_is_complete(name):
    hardware = pick_hardware(name, {})
    assert 0 < hardware.usable < hardware.memory * 2**30
    assert hardware.half_tflops >= hardware.float32_tflops


def test_a_users_numbers_win():
    assert pick_hardware("a100", {"memory": 40.0, "reserve": None}).memory == 40
    assert pick_hardware("a100", {"memory": 40.0}).half_tflops == HARDWARE["a100"].half_tflops


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tpu", {}, "--gpu must be one of a100.*got 'tpu'"),
        ("h100", {"memory": 0.0}, "hardware.memory must be > 0, got 0"),
        ("h100", {"latency": -1.0}, "hardware.latency must be >= 0, got -1"),
        ("h100", {"link_efficiency": 1.5}, "hardware.link_efficiency is a share"),
        ("h100", {"memory": "much"}, "hardware.memory must be a number, got 'much'"),
        ("h100", {"latencey": 1.0}, "unknown key 'hardware.latencey'; did you mean 'hardware.latency'"),
        ("h100", {"reserve": 1.0}, "hardware.reserve is a share"),
    ],
)
def test_numbers_out_of_range(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        pick_hardware(name, changes)


def test_a_ring_inside_a_machine_and_between_machines():
    links = Links(EXACT, per_node=4)
    # Four members of one machine: each receives three quarters of 8 GB through its own link of 100 GB/s.
    assert links.gather(8e9, range(4)) == pytest.approx(8 * 3 / 4 / 100)
    # Eight on two machines: half of it comes from the other machine, through four adapters of 10 GB/s together.
    assert links.gather(8e9, range(8)) == pytest.approx(8 / 2 / 4 / 10)
    # One member on each of two machines: a single adapter.
    assert links.gather(8e9, [0, 4]) == pytest.approx(8 / 2 / 10)
    assert links.gather(8e9, [0]) == 0


def test_an_exchange_is_as_slow_as_its_slowest_link():
    links = Links(EXACT, per_node=4)
    assert links.exchange(8e9, range(4)) == pytest.approx(8 * 3 / 4 / 100)
    assert links.exchange(8e9, range(8)) == pytest.approx(8 * 4 / 8 / 10)
    assert links.exchange(8e9, range(1)) == 0
