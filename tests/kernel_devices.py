"""Where kernels can be tested, and how near is near."""

import os

import pytest

from methods.kernels import norms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# CPU builds of torch come without Triton. Where it is installed, these cases run the kernels' own code on a CPU; on a
# GPU the cases marked `gpu` run it compiled.
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or norms.triton is None, reason="needs Triton's interpreter"
)
KERNEL_DEVICES = [pytest.param("cpu", marks=interpreted), DEVICES[1]]


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()
