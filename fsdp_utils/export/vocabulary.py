"""A tokenizer in the words of llama.cpp: vocabulary, merges or scores, how text is split, special tokens, template."""

import json
import re
from collections.abc import Iterable

from gguf import GGUFWriter, TokenType

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say

SPACE = "▁"  # what SentencePiece writes for one
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
ADDED_SCORE = -1000.0  # of tokens that no merge makes
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT, DIGITS = "ByteLevel", "Digits"
# How text is split before it is merged, whether whole words are looked up first -> llama.cpp's name for it. Its own
# converter knows these names by hashes of known vocabularies' ids; what llama-vocab.cpp does for a name is this.
PRE_TOKENIZERS = {
    ((GPT2_SPLIT,), False): "gpt-2",
    ((DIGITS, GPT2_SPLIT), False): "smollm",
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "smaug-bpe",
    ((QWEN2_SPLIT,), False): "qwen2",
    ((TEKKEN_SPLIT,), True): "tekken",
}
PREPENDED = {"first": True, "always": True, "never": False}  # of Metaspace


def write_vocabulary(writer: GGUFWriter, tokenizer, *, size: int, ends: Iterable[int], named: str) -> None:
    """Gives a writer everything that it says of the tokenizer.

    Args:
        size: rows of the embedding; ids that the tokenizer lacks are padded.
        ends: ids that end an answer.

    Raises:
        UserError: llama.cpp would read text otherwise than the tokenizer does, or it has ids that the model lacks.
    """
    if not tokenizer.is_fast:
        raise _refusal(named, f"{type(tokenizer).__name__} has no tokenizer.json")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise _refusal(named, f"a {content['model']['type']} model")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]]
    if not merges:
        raise _refusal(named, "a vocabulary without merges")
    tokens, types = _tokens(tokenizer, size=size, named=named)
    if content["model"].get("byte_fallback"):
        _write_sentencepiece(writer, content, tokens, types, merges, named=named)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(content, named=named))
        # a space divides the two parts of a merge
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special(writer, tokenizer, ends=ends)


def _refusal(named: str, what: str) -> UserError:
    return UserError(f"{named}: llama.cpp knows no such tokenizer ({what}); use --infer_type merged")


def _tokens(tokenizer, *, size: int, named: str) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every id."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for text, number in tokenizer.get_vocab().items():
        if number >= size:
            raise UserError(f"{named}: its tokenizer has an id {number} ({text!r}), and the model {size} embeddings")
        tokens[number], types[number] = text, TokenType.NORMAL
        if number in added:
            types[number] = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
            tokens[number] = text.replace(SPACE, " ")  # these are compared with text as it is
    return tokens, types


# ---------------------------------------------------------------------------------------------------------------------
# Merges over bytes
# ---------------------------------------------------------------------------------------------------------------------


def _pre_tokenizer(content: dict, *, named: str) -> str:
    """llama.cpp's name for how a tokenizer.json splits text."""
    normalizer = (content["normalizer"] or {}).get("type", "NFC")  # which llama.cpp leaves out, too
    parts = tuple(part for part in map(_part, _flat(content["pre_tokenizer"])) if part)
    name = PRE_TOKENIZERS.get((parts, bool(content["model"].get("ignore_merges"))))
    if name is None or normalizer != "NFC":
        found = json.dumps(content["pre_tokenizer"], ensure_ascii=False)
        raise _refusal(named, f"normalizer {normalizer}, split by {found}")
    return name


def _flat(node: dict | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer."""
    if node is None:
        return []
    inner = node.get("pretokenizers", node.get("normalizers"))
    return [node] if inner is None else [step for part in inner for step in _flat(part)]


def _part(step: dict) -> str:
    """What a step does to text, empty for nothing."""
    known = {key: value for key, value in step.items() if key not in ("trim_offsets", "invert")}
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2_SPLIT if step.get("use_regex", True) else ""
    if known == dict(type="Digits", individual_digits=True):
        return DIGITS
    isolates = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return step["pattern"].get("Regex", "?") if isolates else "?"


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece
# ---------------------------------------------------------------------------------------------------------------------


def _write_sentencepiece(writer, content, tokens, types, merges, *, named: str) -> None:
    unknown = content["model"].get("unk_token")
    for number, token in enumerate(tokens):
        if BYTE.fullmatch(token):
            types[number] = TokenType.BYTE
        elif token == unknown:
            types[number] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL]
    scores = _scores(normal, merges, named=named)
    writer.add_token_scores([scores.get(token, ADDED_SCORE) for token in tokens])
    writer.add_add_space_prefix(_prepends(content, named=named))


def _scores(normal: list[str], merges: list[tuple[str, str]], *, named: str) -> dict[str, float]:
    """By which SentencePiece joins what the merges join, in their order: it joins any two neighbours that are a token
    together, the highest score first."""
    ranks, known, vocabulary = {}, set(merges), set(normal)
    for number, (left, right) in enumerate(merges):
        rank = ranks.setdefault(left + right, number)
        if rank < number and left + right != "".join(merges[number - 1]):
            raise _refusal(named, f"merges of {left + right!r} that stand apart")
    for token in normal:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if vocabulary.issuperset(pair) and pair not in known:
                raise _refusal(named, f"no merge of {pair[0]!r} and {pair[1]!r}, but their token")
    return {token: -float(rank) for token, rank in ranks.items()}


def _prepends(content: dict, *, named: str) -> bool:
    """Whether a space is put before a text."""
    steps = [*_flat(content["normalizer"]), *_flat(content["pre_tokenizer"])]
    kinds = [step["type"] for step in steps]
    if kinds == ["Metaspace"] and not steps[0]["split"]:
        if steps[0]["prepend_scheme"] == "first":
            say("note: llama.cpp puts a space before a text also where it begins with one or follows a special token")
        return PREPENDED[steps[0]["prepend_scheme"]]
    if kinds in (["Prepend", "Replace"], ["Replace"]) and steps[-1]["pattern"] == {"String": " "}:
        return kinds[0] == "Prepend"
    raise _refusal(named, f"steps {kinds}")


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens and template
# ---------------------------------------------------------------------------------------------------------------------


def _write_special(writer: GGUFWriter, tokenizer, *, ends: Iterable[int]) -> None:
    ids = dict(bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    others = [number for number in ends if number != ids["eos"]]
    if ids["eos"] is None and others:
        ids["eos"] = others.pop(0)
    ids |= dict(unk=tokenizer.unk_token_id) | dict(zip(("eot", "eom"), others, strict=False))  # it has no more places
    for name, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    # what the tokenizer does, whatever its files say
    begun = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and begun[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and begun[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [dict(name=name, template=text) for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
