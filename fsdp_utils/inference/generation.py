"""Answers to prompts: batched generation with transformers, or vLLM where it is installed."""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria

from fsdp_utils.core.devices import peak_memory_gib
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import is_main
from fsdp_utils.data.encode import TextEncoder
from fsdp_utils.folders.describe import Run, generation_folder, tokenizer_folder
from fsdp_utils.folders.documents import end_tokens
from fsdp_utils.inference import decoding
from fsdp_utils.inference.scoring import NEXT_PROMPT

TAIL = 16  # tokens, enough for the longest mark of a next prompt even byte by byte
READ_EVERY = 8  # tokens between two looks at what was generated; each makes the GPU wait for the host
VLLM_CHUNK = 512  # prompts between two writes of the partial result
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Output(NamedTuple):
    """One generated answer.

    Args:
        index: of its prompt.
        text: without special tokens, and not yet cut at a next prompt.
        tokens: generated ones, with the end-of-sequence token.
        seconds: its share of its batch's time.
        peak_memory_gib: of this process so far.
    """

    index: int
    text: str
    tokens: int
    seconds: float
    peak_memory_gib: float


def prompt_ids(prompts: list[str], tokenizer) -> list[list[int]]:
    """Ids that generation starts from: the special prefix and the prompt, exactly as in training."""
    return TextEncoder(tokenizer).prompts(prompts)


def end_ids(model: nn.Module, tokenizer) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those the model names (Llama 3 has several)."""
    named = getattr(model, "generation_config", None)
    ids = getattr(named, "eos_token_id", None) or []
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, tokenizer.eos_token_id} - {None})


class NextPrompt(StoppingCriteria):
    """Ends a row once it has begun a question of its own; only generated tokens count, prompts hold the mark too."""

    def __init__(self, tokenizer, *, start: int):
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids, scores, **kwargs):
        tails = self.tokenizer.batch_decode(input_ids[:, max(self.start, input_ids.shape[1] - TAIL) :])
        return torch.tensor([bool(NEXT_PROMPT.search(tail)) for tail in tails], device=input_ids.device)


class RowEnds:
    """Where each row ends, found where `generate` with `NextPrompt` ends it, but some tokens later."""

    def __init__(self, tokenizer, ends: list[int], *, rows: int):
        self.tokenizer, self.ends, self.read = tokenizer, ends, 0
        self.lengths: list[int | None] = [None] * rows  # with the token that ended the row

    def update(self, rows: list[list[int]]) -> bool:
        """Takes all tokens generated so far, `[rows][n]`; returns whether every row has ended."""
        for row, tokens in enumerate(rows):
            if self.lengths[row] is None:
                self.lengths[row] = self._length(tokens)
        self.read = len(rows[0])
        return None not in self.lengths

    def _length(self, tokens: list[int]) -> int | None:
        fresh = range(self.read + 1, len(tokens) + 1)
        ended = next((n for n in fresh if tokens[n - 1] in self.ends), None)
        last = ended or len(tokens)
        if not self._marked(tokens[max(0, self.read + 1 - TAIL) : last]):
            return ended
        return next((n for n in fresh if n <= last and self._marked(tokens[max(0, n - TAIL) : n])), ended)

    def _marked(self, tokens: list[int]) -> bool:
        return bool(NEXT_PROMPT.search(self.tokenizer.decode(tokens)))


class HFGenerator:
    """Batches of answers from a transformers model on one device, with a KV cache.

    `generate` is the definition; where the model allows, a `StaticDecoder` gives the same tokens with fewer launches.

    Args:
        temperature: 0 is greedy.
        seed: of sampling; a batch is seeded by its first question, so that the same batches give the same answers.
        static_cache: whether to decode by `StaticDecoder`; None: on CUDA, which replays its steps as graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        static_cache: bool | None = None,
    ):
        self.model, self.tokenizer, self.temperature, self.seed = model, tokenizer, temperature, seed
        self.device = next(model.parameters()).device
        wanted = self.device.type == "cuda" if static_cache is None else static_cache
        self.static = wanted and decoding.supported(model)
        self.decoder: decoding.StaticDecoder | None = None
        self.ends = end_ids(model, tokenizer)
        # a padding token may have been added to the tokenizer alone
        known = model.config.get_text_config().vocab_size
        self.pad = next(i for i in (tokenizer.pad_token_id, *self.ends, 0) if i is not None and i < known)
        sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        # replaced, not passed: what a checkpoint's own file sets (top_p, temperature) would fill the gaps
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            use_cache=True,
            **sampling,
        )

    def answers(self, prompts: list[tuple[int, list[int]]], *, batch_size: int) -> Iterator[Output]:
        """Generates from `(index, ids)` pairs, longest first, so that what does not fit fails at once.

        A batch that does not fit into memory is halved, and so are those after it.

        Raises:
            UserError: a single prompt does not fit into memory, or not into the model's context.
        """
        waiting = sorted(prompts, key=lambda pair: -len(pair[1]))
        self._check_length(len(waiting[0][1]) if waiting else 0)
        with tqdm(total=len(waiting), desc="answering", unit="question", disable=not is_main()) as bar:
            while waiting:
                batch = waiting[:batch_size]
                outputs = self._try(batch)
                if outputs is None:
                    batch_size = self._halve(len(batch))
                    continue
                waiting = waiting[len(batch) :]
                yield from outputs
                bar.update(len(batch))
        self.decoder = None

    @property
    def max_new_tokens(self) -> int:
        return self.model.generation_config.max_new_tokens

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.max_new_tokens
        if limit and longest + new > limit:
            raise UserError(
                f"--max_new_tokens {new}: with the longest prompt ({longest} tokens) exceeds the model's {limit} "
                "positions; lower it or --n_shots"
            )

    def _try(self, batch) -> list[Output] | None:
        """None if memory ran out; the tensors of the failed attempt are free once this has returned."""
        try:
            return self._generate(batch)
        except torch.OutOfMemoryError:
            self.decoder = None
            return None

    def _halve(self, size: int) -> int:
        if size == 1:
            raise UserError("--batch_size 1: does not fit into memory; lower --max_new_tokens or --n_shots")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tqdm.write(f"a batch of {size} does not fit into memory; going on with {size // 2}")
        return size // 2

    @torch.inference_mode()
    def _generate(self, batch) -> list[Output]:
        begun = time.perf_counter()
        new_tokens = self._by_steps if self.static else self._by_generate
        generated = new_tokens(*self._padded([ids for _, ids in batch]), seed=self.seed + batch[0][0])
        seconds = (time.perf_counter() - begun) / len(batch)
        peak = peak_memory_gib(self.device)
        return [
            Output(index, self.tokenizer.decode(new, skip_special_tokens=True), len(new), seconds, peak)
            for (index, _), new in zip(batch, map(self._until_end, generated), strict=True)
        ]

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask `[rows, L]` on the device."""
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):  # on the left: what is generated must follow the prompt
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        return input_ids.to(self.device), mask.to(self.device)

    def _by_generate(self, input_ids: torch.Tensor, mask: torch.Tensor, *, seed: int) -> list[list[int]]:
        """Tokens that follow each prompt of `[rows, L]`, padded to the longest answer; waits for the device."""
        width = input_ids.shape[1]
        torch.manual_seed(seed)
        stops = [NextPrompt(self.tokenizer, start=width)]
        generated = self.model.generate(input_ids=input_ids, attention_mask=mask, stopping_criteria=stops)
        return generated[:, width:].tolist()

    def _by_steps(self, input_ids: torch.Tensor, mask: torch.Tensor, *, seed: int) -> list[list[int]]:
        """What `_by_generate` returns, without the padding. Rows that have ended go on, and are cut."""
        rows, width = input_ids.shape
        decoder = self._decoder_for(rows=rows, tokens=width + self.max_new_tokens)
        ends = RowEnds(self.tokenizer, self.ends, rows=rows)
        generator = torch.Generator(self.device).manual_seed(seed)  # not the default one, which a graph takes hold of
        new = torch.empty(rows, self.max_new_tokens, dtype=torch.long, device=self.device)
        logits = decoder.prefill(input_ids, mask)
        for i in range(self.max_new_tokens):
            if i:
                logits = decoder.step(new[:, i - 1])
            new[:, i] = self._choose(logits, generator)
            if (i + 1) % READ_EVERY == 0 or i + 1 == self.max_new_tokens:
                tokens = new[:, : i + 1].tolist()  # waits for the device
                if ends.update(tokens):
                    break
        return [row[:length] for row, length in zip(tokens, ends.lengths, strict=True)]

    def _decoder_for(self, *, rows: int, tokens: int) -> decoding.StaticDecoder:
        """That of the last batch where it fits: capturing costs two steps that are launched kernel by kernel."""
        if self.decoder is None or not self.decoder.fits(rows=rows, tokens=tokens):
            graphs = self.decoder.graphs if self.decoder else self.device.type == "cuda"  # one failure is enough
            self.decoder = None  # its memory before that of the next
            length = decoding.cache_length(tokens)
            self.decoder = decoding.StaticDecoder(self.model, rows=rows, length=length, graphs=graphs)
        return self.decoder

    def _choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Next tokens `[rows]` of fp32 logits `[rows, vocabulary]`, chosen as `generate` does."""
        if not self.temperature:
            return logits.argmax(dim=-1)
        chances = (logits / self.temperature).softmax(dim=-1)
        return torch.multinomial(chances, 1, generator=generator).squeeze(1)

    def _until_end(self, new: list[int]) -> list[int]:
        """Without the padding of a row that ended before the longest of its batch."""
        stop = next((i + 1 for i, token in enumerate(new) if token in self.ends), len(new))
        while stop and new[stop - 1] == self.pad and self.pad not in self.ends:
            stop -= 1
        return new[:stop]


class VLLMGenerator:
    """vLLM's `LLM.generate` (docs.vllm.ai, offline inference); an adapter goes through a LoRARequest.

    `check_vllm` says beforehand whether it can compute what was trained.
    """

    def __init__(self, run: Run, *, max_new_tokens: int, temperature: float, seed: int, dtype: str):
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        options = dict(trust_remote_code=run.trust_remote_code)
        if run.adapter:
            rank = next((r for r in VLLM_RANKS if r >= run.rank), run.rank)
            options |= dict(enable_lora=True, max_lora_rank=rank)
        self.llm = LLM(model=str(run.base), tokenizer=str(tokenizer_folder(run)), dtype=dtype, seed=seed, **options)
        self.request = LoRARequest("adapter", 1, str(run.adapter_folder)) if run.adapter else None
        stops = dict(stop=["###Question", "###Context"], stop_token_ids=end_tokens(generation_folder(run)))
        self.sampling = SamplingParams(temperature=temperature, max_tokens=max_new_tokens, seed=seed, **stops)

    def answers(self, prompts: list[tuple[int, list[int]]], *, batch_size: int) -> Iterator[Output]:
        """Generates from `(index, ids)` pairs; vLLM forms its own batches, `batch_size` is not used."""
        for first in range(0, len(prompts), VLLM_CHUNK):
            chunk = prompts[first : first + VLLM_CHUNK]
            begun = time.perf_counter()
            inputs = [{"prompt_token_ids": ids} for _, ids in chunk]
            answers = self.llm.generate(inputs, self.sampling, lora_request=self.request)
            seconds = (time.perf_counter() - begun) / len(chunk)
            for (index, _), answer in zip(chunk, answers, strict=True):
                best = answer.outputs[0]
                # the engine runs in a process of its own, whose memory is not seen from here
                yield Output(index, best.text, len(best.token_ids), seconds, 0.0)


def check_vllm(run: Run, eval_type: str | None) -> None:
    """Raises UserError where vLLM is missing or would compute something else than was trained."""
    if find_spec("vllm") is None:
        raise UserError("--backend vllm: vLLM is not installed; `pip install vllm`, or use --backend hf")
    if eval_type not in (None, "full", run.train_type):
        raise UserError(f"--eval_type {eval_type}: vLLM takes weights as they are; export them with prepare_weights.py")
    if run.dora or (run.kind == "adapter" and run.quantizer):
        what = "DoRA adapters" if run.dora else "an adapter over a base that we quantized"
        raise UserError(f"--backend vllm: does not serve {what}; use prepare_weights.py first, or --backend hf")
