"""When two steps count as the same."""

import pytest
import torch

Step = tuple[float, dict[str, torch.Tensor]]  # loss, and gradients by name


def assert_close(got: Step, want: Step, *, relative: float) -> None:
    """Loss and every gradient agree, relative to the largest entry of each."""
    assert got[0] == pytest.approx(want[0], rel=relative)
    assert got[1].keys() == want[1].keys() and want[1]
    for name, gradient in want[1].items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert (got[1][name] - gradient).abs().max() / scale < relative, name


def assert_close_norm(got: Step, want: Step, *, relative: float) -> None:
    """Loss and every gradient agree in norm, as 16-bit numbers can: single entries near zero are mostly rounding."""
    assert got[0] == pytest.approx(want[0], rel=relative)
    assert got[1].keys() == want[1].keys() and want[1]
    for name, gradient in want[1].items():
        difference = (got[1][name].float() - gradient.float()).norm()
        assert difference / gradient.float().norm().clamp_min(1e-12) < relative, name


def assert_learns(step: Step) -> None:
    """A parity of zeros would prove nothing."""
    assert step[1] and all(gradient.abs().max() > 0 for gradient in step[1].values())
