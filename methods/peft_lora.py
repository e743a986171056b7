"""PEFT's own LoRA layers around packed linears, for those who want exactly what PEFT computes."""

import warnings

from fsdp_utils.core.errors import UserError
from methods.adapter import Adapter, Pair
from methods.expert_lora import split_targets
from methods.quantizers.linear import QuantizedLinear
from methods.targets import adapter_targets


class PeftLoRA(Adapter):
    def attach(self, model, *, dtype):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora.layer import Linear

        c = self.config
        if split_targets(c.lora_target_modules)[1]:
            raise UserError(
                f"--lora_target_modules {c.lora_target_modules}: experts get adapters by custom_qlora or hqq_lora"
            )
        config = LoraConfig(
            r=c.lora_rank,
            lora_alpha=c.lora_alpha,
            lora_dropout=c.lora_dropout,
            **self._scaling.peft_config,
            target_modules=adapter_targets(model, c.lora_target_modules),
        )
        config._register_custom_module({QuantizedLinear: Linear})
        with warnings.catch_warnings():  # PEFT doubts every layer it does not know, and asks to use this very hook
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            inject_adapter_in_model(config, model, low_cpu_mem_usage=True)  # stays on meta
        for path, layer in self.layers(model).items():
            self.start.attach(path, layer, dtype=dtype)
            for parameter in self.pair(layer):
                parameter.data = parameter.data.to(dtype)

    def layers(self, model):
        from peft.tuners.lora import LoraLayer

        return {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}

    def pair(self, layer):
        return Pair(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
