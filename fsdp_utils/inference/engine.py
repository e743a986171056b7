"""vLLM in this process, where it is installed."""

import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from fsdp_utils.core.errors import UserError
from fsdp_utils.folders.describe import Run, generation_folder, tokenizer_folder
from fsdp_utils.folders.documents import end_tokens
from fsdp_utils.inference.generation import Output

CHUNK = 512  # prompts between two writes of the partial result
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ENVIRONMENT = "requirements-vllm.txt"


class VLLMGenerator:
    """vLLM's `LLM.generate` (docs.vllm.ai, offline inference); an adapter goes through a LoRARequest.

    `check_vllm` says beforehand whether it can compute what was trained.

    Args:
        ends: ids that end an answer, beside those that the model names.
        stops: texts that end an answer.
        options: of `LLM`; those that are 0 are left to it.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int] = (),
        stops: Sequence[str] = (),
        **options,
    ):
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        given = {name: value for name, value in options.items() if value}
        given |= dict(trust_remote_code=run.trust_remote_code, seed=seed)
        if run.adapter:
            given |= dict(enable_lora=True, max_lora_rank=rank_for(run))
        self.llm = LLM(model=str(run.base), tokenizer=str(tokenizer_folder(run)), **given)
        self.request = LoRARequest("adapter", 1, str(run.adapter_folder)) if run.adapter else None
        ended = dict(stop=list(stops), stop_token_ids=sorted({*ends, *end_tokens(generation_folder(run))}))
        self.sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=seed, **ended)

    def answers(self, prompts: list[tuple[int, list[int]]], *, batch_size: int) -> Iterator[Output]:
        """Generates from `(index, ids)` pairs, then ends the engine; vLLM forms its own batches, `batch_size` is not
        used."""
        try:
            for first in range(0, len(prompts), CHUNK):
                chunk = prompts[first : first + CHUNK]
                begun = time.perf_counter()
                inputs = [{"prompt_token_ids": ids} for _, ids in chunk]
                answers = self.llm.generate(inputs, self.sampling, lora_request=self.request)
                seconds = (time.perf_counter() - begun) / len(chunk)
                for (index, _), answer in zip(chunk, answers, strict=True):
                    best = answer.outputs[0]
                    yield Output(index, best.text, len(best.token_ids), seconds)
        finally:
            self.llm.llm_engine.engine_core.shutdown()  # at exit its processes would say so after the score


def rank_for(run: Run) -> int:
    """The rank that vLLM is to make room for: it knows only some."""
    return next((rank for rank in RANKS if rank >= run.rank), run.rank)


def check_vllm(run: Run, eval_type: str | None) -> None:
    """Raises UserError where vLLM is missing or would compute something else than was trained."""
    if find_spec("vllm") is None:
        raise UserError(
            f"--backend vllm: vLLM is not installed here; run in an environment of {ENVIRONMENT}, ask a --server, or "
            "use --backend hf"
        )
    if eval_type not in (None, "full", run.train_type):
        raise UserError(f"--eval_type {eval_type}: vLLM takes weights as they are; export them with prepare_weights.py")
    if run.dora or (run.kind == "adapter" and run.quantizer):
        what = "DoRA adapters" if run.dora else "an adapter over a base that we quantized"
        raise UserError(f"--backend vllm: does not serve {what}; use prepare_weights.py first, or --backend hf")
