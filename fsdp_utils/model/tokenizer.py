"""The tokenizer of a model, read by transformers and held against its own file."""

import re
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
from transformers.utils import cached_file, is_protobuf_available, is_sentencepiece_available

from fsdp_utils.core.errors import UserError, first_line, refuse_code
from fsdp_utils.core.folders import refuse_cache

# spaces, lines, digits, code, contractions, several scripts; each begins with a letter, before which a space may come
PROBES = (
    "a b  c\n\n d\te",
    "The year 1984: 12345 apples, 3.14!",
    "def f(x):\n    return x",
    "Größe naïve 東京 привет мир שלום 🙂",
    "don't I'LL  we're <tag> https://x.y/z?q=1",
)
BEGINNING = 2  # ids that a space put before the text may change
# settings that transformers applies on purpose, whatever tokenizer.json says
APPLIED = {"do_lower_case", "strip_accents", "tokenize_chinese_chars", "fix_mistral_regex"}


def load_tokenizer(folder: str, *, named: str, trust_remote_code: bool):
    """The tokenizer of a folder or hub repository, which messages call `named`.

    Raises:
        UserError: there is none, it cannot be read, or transformers makes another one of it than its file holds.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the libraries below raise nothing more special
        refuse_cache(error, folder=folder)
        refuse_code(error, named=named)
        raise UserError(f"{named}: no tokenizer ({_reason(error, Path(folder))})") from None
    _check(tokenizer, folder, named=named)
    return tokenizer


def _reason(error: Exception, folder: Path) -> str:
    """transformers tries one library after another, and tells of the last."""
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").exists() or _is_tiktoken(path):
        return first_line(error)
    available = dict(sentencepiece=is_sentencepiece_available(), protobuf=is_protobuf_available())
    missing = " ".join(package for package, there in available.items() if not there)
    if missing:
        return f"tokenizer.model takes packages that are not installed; `pip install {missing}`"
    return "tokenizer.model is no SentencePiece model, or damaged; download it again"


def _is_tiktoken(path: Path) -> bool:
    with open(path, "rb") as file:
        return bool(re.match(rb"[A-Za-z0-9+/]+=* \d+\s*$", file.readline(1000)))


def _check(tokenizer, folder: str, *, named: str) -> None:
    """Raises UserError for a tokenizer that knows no text, or splits it otherwise than tokenizer.json says."""
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if set(chain.from_iterable(map(encode, PROBES))) <= {tokenizer.unk_token_id}:
        vocabulary = f"knows no text: its vocabulary has {len(tokenizer)} tokens"
        raise UserError(f"{named}: its tokenizer {vocabulary}; its files are damaged, download them again")
    path = cached_file(folder, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if path is None or not tokenizer.is_fast or APPLIED & tokenizer.init_kwargs.keys():
        return
    file = Tokenizer.from_file(path)
    for text in PROBES:
        ids, wanted = encode(text), file.encode(text, add_special_tokens=False).ids
        if not _alike(ids, wanted) or _text(tokenizer, ids) != file.decode(wanted, skip_special_tokens=False).strip():
            what = f"{type(tokenizer).__name__} reads {text!r} otherwise than tokenizer.json says"
            raise UserError(f"{named}: {what}; {_way_out(folder)}")


def _way_out(folder: str) -> str:
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        return f"transformers takes this class for all {kind} models: put the original tokenizer.json back"
    return (
        'set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, or use transformers 5.22 or later, '
        "which reads more of them as they are"
    )


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


def _alike(ids: list[int], wanted: list[int]) -> bool:
    """Whether they differ at most in the beginning."""
    rest = max(0, min(len(ids), len(wanted)) - BEGINNING)
    return abs(len(ids) - len(wanted)) <= BEGINNING and ids[len(ids) - rest :] == wanted[len(wanted) - rest :]
