"""What tests of data share: tokenizers of the kinds that exist, rows, flags, and what a run makes of them."""

import json
from functools import cache
from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fsdp_utils.data.tokens import prepare_dataset

TEXT = "###Question:\nTwo and two?\n###Answer:\nFour, I answer. [INST] yes no maybe 42 = x [/INST] <|user|>\n"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer, as of GPT-2, Llama 3, Qwen and SmolLM2, that puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def sentencepiece(*, space: str) -> Tokenizer:
    """A SentencePiece BPE tokenizer, as of Llama 2 and Mistral.

    Args:
        space: where it puts a space: "prepend" by its normalizer, before whatever stands between special tokens;
            "first" before the text; "always" as prepend; "never".
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if space == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in TEXT.split()] * 5 + ["\n"], trainer)
    dropped = [] if space == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *dropped]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """A unigram tokenizer with a prefix space, as of T5 and XLM-R."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#:,.?=[]/<>|\n▁é漢"})
    words = [("▁Four", -3.0), ("▁answer", -3.0), ("▁42", -3.0), ("42", -3.5), ("▁yes", -3.0), ("Two", -3.0)]
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in SPECIAL), *words, *((letter, -8.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def stripping(backend: Tokenizer) -> Tokenizer:
    """The same with added tokens that take the white space beside them."""
    backend.add_special_tokens(
        [
            AddedToken("<|left|>", lstrip=True),
            AddedToken("<|right|>", rstrip=True),
            AddedToken("<|word|>", normalized=False),
        ]
    )
    return backend


KINDS = {
    "byte_level": byte_level,
    "sentencepiece_prepend": lambda: sentencepiece(space="prepend"),
    "sentencepiece_first": lambda: sentencepiece(space="first"),
    "sentencepiece_always": lambda: sentencepiece(space="always"),
    "sentencepiece_never": lambda: sentencepiece(space="never"),
    "unigram": unigram,
}


@cache
def _trained(kind: str) -> str:
    return KINDS[kind]().to_str()


def of_kind(kind: str) -> Tokenizer:
    """One of KINDS, trained once."""
    return Tokenizer.from_str(_trained(kind))


def as_tokenizer(backend: Tokenizer, **more) -> PreTrainedTokenizerFast:
    """transformers' tokenizer around it."""
    given = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>") | more
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def make_config(dataset="unused", **changes):
    settings = {"dataset": str(dataset), "dataset_samples": 512, "context_length": 256, "seed": 3, "batch_size": 2}
    settings |= {"gradient_accumulation_steps": 2, "packing": False, "explicit_flags": frozenset()}
    return SimpleNamespace(**(settings | changes))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(n):
    return [{"question": f"How much is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(n)]


def trained_text(prepared, tokenizer, row=0):
    """The text of the labels of a row."""
    labels = prepared.dataset[row]["labels"]
    return tokenizer.decode(labels[labels != -100])


def prepared(tmp_path, tokenizer, *rows, **flags):
    """What a run makes of these rows."""
    return prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", rows), **flags), tokenizer)
