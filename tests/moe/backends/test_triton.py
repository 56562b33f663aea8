import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmoe.moe import SparseMoE
from vmoe.moe.backends import triton as kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter():
    """All of `interpreted_kernels.py`, where the interpreter is on before Triton is imported."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    # No plugins and no conftest.py: the file needs none, and importing them takes seconds.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VMOE_TRITON": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", str(file)]
    # Not the project's options: those name the plugin for several processes.
    command += ["-o", "addopts=--import-mode=importlib"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


@needs_triton
def test_kernels_compile_for_a_gpu():
    """The interpreter accepts more than the compiler does; the compiler needs no GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vmoe.moe.backends.triton import products

    common = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PRECISION": "ieee", "UPCAST": False}
    tiled = {**common, "GROUP_M": 8}
    linear, gradient = products._linear_kernel, products._activation_gradient_kernel
    cases = [
        (linear, {**tiled, "ACTIVATION": "gelu", "weight_ptr": None, "x_i": 1, "w_i": 1}),
        (linear, {**tiled, "ACTIVATION": "none", "index_ptr": None, "h_ptr": None, "x_i": 1, "w_o": 1}),
        (gradient, {**tiled, "ACTIVATION": "gelu_tanh", "g_i": 1, "w_o": 1}),
        (gradient, {**tiled, "ACTIVATION": "relu", "weight_ptr": None, "dot_ptr": None, "g_i": 1, "w_o": 1}),
        (products._weight_gradient_kernel, {**common, "x_index_ptr": None, "g_o": 1, "x_i": 1}),
        (products._gather_sum_kernel, {"K": 2, "BLOCK_S": 16, "BLOCK_D": 64}),
    ]
    types = {"index_ptr": "*i64", "g_index_ptr": "*i64", "x_index_ptr": "*i64", "row_ptr": "*i64"}
    types |= {"tile_ptr": "*i32", "end_ptr": "*i32", "weight_ptr": "*fp32", "dot_ptr": "*fp32"}
    for number, (kernel, constants) in enumerate(cases):
        data = ("*bf16", "*fp32")[number % 2]
        signature = {
            name: "constexpr" if name in constants else types.get(name, data if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        compiled = compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True},
        )
        assert "cubin" in compiled.asm


def fresh_copy():
    """The package's switch as a new process would find it."""
    spec = importlib.util.spec_from_file_location("kernels_copy", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_triton
def test_the_switch(monkeypatch):
    monkeypatch.delenv("VMOE_TRITON", raising=False)
    assert not fresh_copy()._enabled
    monkeypatch.setenv("VMOE_TRITON", "1")
    assert fresh_copy()._enabled
    monkeypatch.setenv("VMOE_TRITON", "yes")
    with pytest.raises(ValueError, match="VMOE_TRITON must be 0 or 1, got 'yes'"):
        fresh_copy()


def test_without_triton_all_is_as_before_and_the_switch_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("VMOE_TRITON", "0")
    copy = fresh_copy()
    with pytest.raises(ModuleNotFoundError, match="need the package triton"):
        copy.enable()
    layer = SparseMoE(8, 16, num_experts=2)
    assert not copy.can_run(layer.experts, torch.zeros(4, 8))
    assert layer(torch.randn(1, 4, 8)).shape == (1, 4, 8)


@needs_triton
def test_on_a_cpu_the_switch_changes_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", True)
    assert not kernels.can_run(SparseMoE(8, 16, num_experts=2).experts, torch.zeros(4, 8))
