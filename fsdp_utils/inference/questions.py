"""Causal language models: questions in prompts or chats, answered in this process, by vLLM or by a server."""

import torch

from fsdp_utils.folders.describe import tokenizer_of
from fsdp_utils.inference.asking import make_asking
from fsdp_utils.inference.engine import VLLMGenerator
from fsdp_utils.inference.exam import Written
from fsdp_utils.inference.generation import HFGenerator
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.server import Server, ServerGenerator
from fsdp_utils.options import DTYPES


def stored_dtype(config) -> torch.dtype | None:
    """--dtype; None for auto."""
    return None if config.dtype == "auto" else getattr(torch, DTYPES[config.dtype])


class Questions(Written):
    def __init__(self, config, run, tokenizer, *, task):
        self.config, self.asking = config, make_asking(config, run, tokenizer)
        self.questions, self.inputs = self.asking.questions, [prompt.ids for prompt in self.asking.prompts]
        self.stops = self.asking.style.stops

    def answerer(self, run, *, device):
        config, asking = self.config, self.asking
        settings = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed)
        settings |= dict(ends=asking.ends, stops=asking.style.stops)
        if config.server:
            server, bodies = Server(config.server), [prompt.body for prompt in asking.prompts]
            named = dict(model=server.model(config.served_model_name), endpoint=asking.style.endpoint)
            return ServerGenerator(server, bodies=bodies, **named, **settings)
        if config.backend == "vllm":
            room = dict(max_model_len=config.max_model_len, gpu_memory_utilization=config.gpu_memory_utilization)
            return VLLMGenerator(run, dtype=DTYPES.get(config.dtype, "auto"), **room, **settings)
        model = load_for_inference(run, device=device, dtype=stored_dtype(config), eval_type=config.reading)
        return HFGenerator(model, tokenizer_of(run), **settings)
