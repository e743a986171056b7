"""Tokenizers are what their files say, whatever class transformers puts over them."""

import io
import json

import pytest
from real_run import set_json
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny import byte_tokenizer, make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fsdp_utils.core.errors import UserError
from fsdp_utils.model import tokenizer as reading
from fsdp_utils.model.build import read_tokenizer

pytestmark = pytest.mark.versions

SENTENCES = ["the quick brown fox", "hello world 123", "def f(x):\n    return x"] * 30
AS_LLAMA = dict(  # how Llama's SentencePiece model was trained
    model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
    split_digits=True, allow_whitespace_only_pieces=True,
)  # fmt: skip
SPECIAL = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def sentencepiece_model(tmp_path):
    """A model whose only tokenizer file is SentencePiece's."""
    folder, written = make_model(tmp_path / "model", vocab_size=400), io.BytesIO()
    (folder / "tokenizer.json").unlink()
    options = dict(vocab_size=350, hard_vocab_limit=False, minloglevel=2)
    SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES), model_writer=written, **options, **AS_LLAMA)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", **SPECIAL)))
    return folder


def test_tokenizer_model_alone(sentencepiece_model):
    """A folder with tokenizer.model is read as SentencePiece reads it."""
    tokenizer = read_tokenizer(str(sentencepiece_model))
    reference = SentencePieceProcessor(model_file=str(sentencepiece_model / "tokenizer.model"))
    for text in ("hello world", "two  spaces", "héé 12", "a\n\n    b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("content", [b"garbage" * 10, b"", b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"])
def test_a_damaged_tokenizer_model(sentencepiece_model, content):
    """The line names the file, not a package that would not help."""
    (sentencepiece_model / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer.*(damaged)") as error:
        read_tokenizer(str(sentencepiece_model))
    assert "tiktoken" not in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package(sentencepiece_model, monkeypatch):
    """Without sentencepiece, the line says what to install."""
    monkeypatch.setattr(reading, "is_sentencepiece_available", lambda: False)
    (sentencepiece_model / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"tokenizer\.model takes .*`pip install sentencepiece`"):
        read_tokenizer(str(sentencepiece_model))


def byte_level(pattern: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes that are cut by GPT-2's rule, or by another one, and merged in pairs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<s>", "</s>", "<unk>", "12", "19", "Ġr"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("1", "9"), ("Ġ", "r")]))
    cut = pre_tokenizers.Split(Regex(pattern or r"\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def saved_as(folder, tokenizer, **settings):
    tokenizer.save_pretrained(folder)
    set_json(folder / "tokenizer_config.json", **settings)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def test_a_class_over_another_file(tmp_path):
    """Qwen's class cuts digits apart, whatever tokenizer.json says: refused, with a way out that works. With Qwen's own
    model_type transformers takes no other class."""
    folder = saved_as(tmp_path, byte_level(), tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(UserError, match=r"Qwen2Tokenizer reads .*1984.*\"PreTrainedTokenizerFast\"") as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value)
    set_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    ids = read_tokenizer(folder)("in 1912")["input_ids"]
    assert ids == Tokenizer.from_file(f"{folder}/tokenizer.json").encode("in 1912").ids
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match=r"says; .*put the original tokenizer\.json back"):
        read_tokenizer(folder)


def test_a_llama_class_over_bytes(tmp_path):
    """transformers 5.17 to 5.21 lose spaces here, which is refused; later versions read the file as it is."""
    folder = saved_as(tmp_path, byte_tokenizer(), tokenizer_class="LlamaTokenizerFast")
    try:
        tokenizer = read_tokenizer(folder)
    except UserError as error:
        assert "transformers 5.22" in str(error)
    else:
        assert tokenizer.decode(tokenizer(" a  b\n c")["input_ids"]) == " a  b\n c"


@pytest.mark.parametrize(
    "settings",
    [
        dict(tokenizer_class="GPT2TokenizerFast", add_prefix_space=True),
        dict(tokenizer_class="GPT2TokenizerFast", add_bos_token=True),
        dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=True),
    ],
)
def test_settings_that_transformers_means_to_apply(tmp_path, settings):
    """What tokenizer_config.json sets is no difference to tokenizer.json."""
    read_tokenizer(saved_as(tmp_path, byte_tokenizer(), **settings))


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_s_own_file(sentencepiece_model, tmp_path, legacy):
    """What a Llama class writes as tokenizer.json is read by it again, whichever way it puts a space in front."""
    read_tokenizer(str(sentencepiece_model)).save_pretrained(tmp_path / "again")
    set_json(tmp_path / "again" / "tokenizer_config.json", legacy=legacy)
    read_tokenizer(str(tmp_path / "again"))
