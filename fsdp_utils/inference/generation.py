"""Answers to prompts: batched generation with transformers."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria

from fsdp_utils.core.devices import peak_memory_gib
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import is_main
from fsdp_utils.inference import decoding
from fsdp_utils.inference.scoring import NEXT_PROMPTS

TAIL = 16  # tokens, enough for the longest mark of a next prompt even byte by byte
READ_EVERY = 8  # tokens between two looks at what was generated; each makes the GPU wait for the host


class Output(NamedTuple):
    """One generated answer.

    Args:
        index: of its prompt.
        text: without special tokens, and not yet cut at a next prompt.
        tokens: generated ones, with the end-of-sequence token.
        seconds: its share of its batch's time.
        peak_memory_gib: of this process so far; None where another process computes.
    """

    index: int
    text: str
    tokens: int
    seconds: float
    peak_memory_gib: float | None = None


def end_ids(model: nn.Module, tokenizer, more: Sequence[int] = ()) -> list[int]:
    """Every token that ends an answer: the tokenizer's, those the model names (Llama 3 has several), and `more`."""
    named = getattr(model, "generation_config", None)
    ids = getattr(named, "eos_token_id", None) or []
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({*ids, *more, tokenizer.eos_token_id} - {None})


class Marks:
    """Texts at which an answer ends, as the beginning of a next prompt; there may be none.

    Args:
        stops: these texts; each is among the last TAIL tokens once it is whole.
    """

    def __init__(self, tokenizer, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops

    def within(self, tokens) -> bool:
        """Whether one of them is in the text of these tokens `[n]`."""
        text = self.tokenizer.decode(tokens) if self.stops else ""
        return any(stop in text for stop in self.stops)


class NextPrompt(StoppingCriteria):
    """Ends a row once it has begun a question of its own; only generated tokens count, prompts hold the mark too."""

    def __init__(self, marks: Marks, *, start: int):
        self.marks, self.start = marks, start

    def __call__(self, input_ids, scores, **kwargs):
        tails = input_ids[:, max(self.start, input_ids.shape[1] - TAIL) :]
        return torch.tensor([self.marks.within(tail) for tail in tails], device=input_ids.device)


class RowEnds:
    """Where each row ends, found where `generate` with `NextPrompt` ends it, but some tokens later."""

    def __init__(self, marks: Marks, ends: list[int], *, rows: int):
        self.marks, self.ends, self.read = marks, ends, 0
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
        if not self.marks.within(tokens[max(0, self.read + 1 - TAIL) : last]):
            return ended
        return next((n for n in fresh if n <= last and self.marks.within(tokens[max(0, n - TAIL) : n])), ended)


class Batched:
    """Batches of answers from a model on one device.

    Attributes:
        way_out: what to do where a single question does not fit into memory.
    """

    way_out = "lower --max_new_tokens or --n_shots"
    device: torch.device

    def answers(self, prompts: list[tuple[int, list[int]]], *, batch_size: int) -> Iterator:
        """The answers to `(index, ids)` pairs, longest first, so that what does not fit fails at once.

        A batch that does not fit into memory is halved, and so are those after it.

        Raises:
            UserError: a single prompt does not fit into memory, or not into the model's context.
        """
        waiting = sorted(prompts, key=lambda pair: -len(pair[1]))
        self.check_length(len(waiting[0][1]) if waiting else 0)
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
        self.free()

    def answer(self, batch: list[tuple[int, list[int]]]) -> list:
        """The answers to a batch."""
        raise NotImplementedError

    def check_length(self, longest: int) -> None:
        """Raises UserError where the model has too few positions for so many tokens."""

    def free(self) -> None:
        """Drops what is kept between batches."""

    def _try(self, batch) -> list | None:
        """None if memory ran out; the tensors of the failed attempt are free once this has returned."""
        try:
            return self.answer(batch)
        except torch.OutOfMemoryError:
            self.free()
            return None

    def _halve(self, size: int) -> int:
        if size == 1:
            raise UserError(f"--batch_size 1: does not fit into memory; {self.way_out}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        tqdm.write(f"a batch of {size} does not fit into memory; going on with {size // 2}")
        return size // 2


class HFGenerator(Batched):
    """Batches of answers from a transformers model on one device, with a KV cache.

    `generate` is the definition; where the model allows, a `StaticDecoder` gives the same tokens with fewer launches.

    Args:
        temperature: 0 is greedy.
        seed: of sampling; a batch is seeded by its first question, so that the same batches give the same answers.
        ends: ids that end an answer, beside those that the model and the tokenizer name.
        stops: texts that end an answer.
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
        ends: Sequence[int] = (),
        stops: Sequence[str] = NEXT_PROMPTS,
        static_cache: bool | None = None,
    ):
        self.model, self.tokenizer, self.temperature, self.seed = model, tokenizer, temperature, seed
        self.marks = Marks(tokenizer, stops)
        self.device = next(model.parameters()).device
        wanted = self.device.type == "cuda" if static_cache is None else static_cache
        self.static = wanted and decoding.supported(model)
        self.decoder: decoding.StaticDecoder | None = None
        self.ends = end_ids(model, tokenizer, ends)
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

    @property
    def max_new_tokens(self) -> int:
        return self.model.generation_config.max_new_tokens

    def check_length(self, longest):
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        new = self.max_new_tokens
        if limit and longest + new > limit:
            raise UserError(
                f"--max_new_tokens {new}: with the longest prompt ({longest} tokens) exceeds the model's {limit} "
                "positions; lower it or --n_shots"
            )

    def free(self):
        self.decoder = None

    @torch.inference_mode()
    def answer(self, batch):
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
        stops = [NextPrompt(self.marks, start=width)]
        generated = self.model.generate(input_ids=input_ids, attention_mask=mask, stopping_criteria=stops)
        return generated[:, width:].tolist()

    def _by_steps(self, input_ids: torch.Tensor, mask: torch.Tensor, *, seed: int) -> list[list[int]]:
        """What `_by_generate` returns, without the padding. Rows that have ended go on, and are cut."""
        rows, width = input_ids.shape
        decoder = self._decoder_for(rows=rows, tokens=width + self.max_new_tokens)
        ends = RowEnds(self.marks, self.ends, rows=rows)
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
