"""PEFT's own LoRA layers around our base linears, for those who want exactly what PEFT computes."""

import warnings

import torch

from fsdp_utils.core.rows import fill
from methods.base import Method
from methods.lora import initial_lora_a
from methods.quantizers.linear import QuantizedLinear
from methods.targets import adapter_targets


class PeftLoRA(Method):
    saves = "adapter"

    def attach(self, model, *, dtype):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import Linear

        c = self.config
        config = LoraConfig(
            r=c.lora_rank,
            lora_alpha=c.lora_alpha,
            lora_dropout=c.lora_dropout,
            target_modules=adapter_targets(model, c.lora_target_modules),
        )
        config._register_custom_module({QuantizedLinear: Linear})
        with warnings.catch_warnings():  # PEFT doubts every layer it does not know, and asks to use this very hook
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)  # stays on meta
        for layer in self.layers(model).values():
            for parameter in self._pair(layer):
                parameter.data = parameter.data.to(dtype)

    @staticmethod
    def layers(model):
        """Path and module of every adapted layer."""
        from peft.tuners.lora import LoraLayer

        return {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}

    @staticmethod
    def _pair(layer):
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def initialize(self, model, *, device):
        for path, layer in self.layers(model).items():
            a, b = self._pair(layer)
            fill(a, initial_lora_a(a.shape, path=path, seed=self.config.seed))
            fill(b, torch.zeros(b.shape))

    def adapter_tensors(self, model):
        for path, layer in self.layers(model).items():
            a, b = self._pair(layer)
            yield f"{path}.lora_A.weight", a
            yield f"{path}.lora_B.weight", b
