"""Full fine-tuning: every parameter trains."""

from methods.base import Method


class Full(Method):
    saves = "model"

    def to_quantize(self, model, quantizer_for):
        return {}

    def attach(self, model, *, dtype):
        model.requires_grad_(True)
