import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.slow
@needs_triton
def test_kernels_in_the_interpreter():
    """All of `interpreted_kernels.py`, where the interpreter is on before Triton is imported."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    # No plugins and no conftest.py: the file needs none, and importing them takes seconds.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
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

    from vmoe.moe.backends.triton import kernels

    common = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PRECISION": "ieee", "UPCAST": False}
    tiled = {**common, "GROUP_M": 8}
    linear, plain = kernels._linear_kernel, {**tiled, "slope_of_ptr": None, "x_i": 1}
    cases = [
        (linear, {**plain, "ACTIVATION": "gelu", "w_i": 1}),
        (linear, {**plain, "ACTIVATION": "none", "b_ptr": None, "h_ptr": None, "w_o": 1}),
        (linear, {**tiled, "ACTIVATION": "gelu_tanh", "b_ptr": None, "x_i": 1, "w_o": 1}),
        (linear, {**tiled, "ACTIVATION": "gelu", "b_ptr": None, "x_i": 1, "w_o": 1}),
        (kernels._weight_gradient_kernel, {**common, "g_o": 1, "x_i": 1}),
        (kernels._weight_gradient_kernel, {**common, "grad_b_ptr": None, "g_o": 1, "x_i": 1}),
    ]
    types = {"tile_ptr": "*i32", "end_ptr": "*i32"}
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
