"""The GGUF export: llama.cpp, transformers and the gguf library read the model and tokenizer that were trained."""

import json
import shutil
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch
from real_run import logits
from safetensors.torch import load_file, save_file
from test_export import kl, stock
from tiny import byte_tokenizer, make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, GgufConfig, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError
from fsdp_utils.export.vocabulary import LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT
from fsdp_utils.folders.describe import describe
from fsdp_utils.model.build import read_model_config
from fsdp_utils.tasks.causal_lm import CAUSAL_LM

TEXTS = [
    "The year 1984: 12345 apples, 3.14!  Two   spaces, don't I'LL we're it's",
    "def f(x):\n    return x\n\n\n\td\te\r\n  end ",
    "Größe naïve 東京は 안녕 привет мир שלום 🙂👍🏽 café",
    "<tag> https://x.y/z?q=1&b=2 #### 18 (a) [b] {c} a_b-c %%% ...",
    " a text that begins with a space and ends with the text of the text ",
    "CamelCase XMLHttpRequest ÀÉ ÀÉb 1,000,000.00 ½ ² ٣٤",
]
SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, **SCALED))
YARN = dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=64))
LINEAR = dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))
CASES = [
    ("llama", {}),
    ("llama", dict(tie_word_embeddings=True)),
    ("llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", LLAMA3),
    ("llama", LINEAR),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", YARN),
    ("qwen3", {}),
]


def split_by(*steps, ignore_merges=False, train_on=TEXTS) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and forty merges that splits text by these steps."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=296, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(train_on, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    wrapped.add_special_tokens(dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>"))
    return wrapped


def gpt2_split():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_regex(pattern):
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only


def sentencepiece_tokenizer(folder: Path) -> LlamaTokenizer:
    """A tokenizer of bytes and a hundred pieces, and its tokenizer.model in `folder`."""
    import sentencepiece

    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=written, model_type="bpe", vocab_size=460, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    set_json_new(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    set_json_new(folder / "config.json", model_type="llama")
    return AutoTokenizer.from_pretrained(folder)


def set_json_new(path: Path, **values) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """`base("llama", tokenizer=…, **config)`: a tiny model with a tokenizer that has merges."""
    made = {}

    def get(family="llama", *, tokenizer=None, **config):
        key = (family, tokenizer and id(tokenizer), str(config))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **config)
            # transformers gives a Qwen its own splitting, whatever the file says
            steps = split_regex(QWEN2_SPLIT) if family.startswith("qwen") else [gpt2_split()]
            (tokenizer or split_by(*steps)).save_pretrained(made[key])
        return made[key]

    return get


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Of the file, fp32, as `[out, in]`."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)).float() for t in reader.tensors}


def kinds_of(folder) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}


def said(folder) -> dict:
    """What the file says, by key."""
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    return {key: field.contents() for key, field in fields.items()}


def halves(weight: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Rows of neighbours (2i, 2i + 1) back as transformers' (i, i + n/2), one by one."""
    width, rows = len(weight) // heads, []
    for head in range(heads):
        begin = head * width
        rows += [begin + 2 * i for i in range(width // 2)] + [begin + 2 * i + 1 for i in range(width // 2)]
    return weight[rows]


NAMES = {  # llama.cpp's parts of a block, and transformers'
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def name_of(name: str) -> str:
    """transformers' name of a tensor of llama.cpp."""
    if not name.startswith("blk."):
        path, leaf = name.rsplit(".", 1)
        return f"{OUTSIDE[path]}.{leaf}"
    _, number, path, leaf = name.split(".")
    return f"model.layers.{number}.{NAMES[path]}.{leaf}"


@pytest.mark.parametrize("family, config", CASES, ids=str)
def test_every_tensor(save_run, base, export, family, config):
    """The file holds the tensors of the merged model, vectors in fp32, queries and keys of a llama in pairs."""
    run, _ = save_run(base(family, **config), "bnb_dora")
    folder = export(run, "gguf", gguf_type="f32")
    found = tensors_of(folder)
    freqs = found.pop("rope_freqs.weight", None)
    if family in ("llama", "mistral"):
        for name in found:
            heads = 4 if ".attn_q." in name else 2 if ".attn_k." in name else None
            found[name] = halves(found[name], heads=heads) if heads else found[name]
    wanted = load_file(export(run, "merged", name="merged", dtype="fp32") / "model.safetensors")
    found = {name_of(name): tensor for name, tensor in found.items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert (freqs is not None) == (config is LLAMA3)
    assert {path.name for path in folder.iterdir()} == {"model.gguf", "README.md"}


def test_scaled_rotary_embedding(save_run, base, export):
    """llama.cpp divides the plain frequencies by what the file holds, and comes to those of the trained model."""
    model = base("llama", **LLAMA3)
    run, _ = save_run(model, "bnb_dora")
    factors = tensors_of(export(run, "gguf"))["rope_freqs.weight"]
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(model), torch.device("cpu"))
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, wanted)
    assert factors.min() == 1 and factors.max() == 8


def gguf_stock(folder):
    return stock(folder, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True))


@pytest.mark.versions
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_it(save_run, base, export, family):
    """transformers' own reader makes the trained model of the file, of which it knows nothing else."""
    run, model = save_run(base(family), "bnb_dora")
    found = logits(gguf_stock(export(run, "gguf", gguf_type="f32")))
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("gguf_type, bits", [("f16", 10), ("bf16", 7)])
def test_halves(save_run, base, export, gguf_type, bits):
    """Matrices are rounded once, from fp32, what was trained at random: f16 keeps three bits more than bf16."""
    run, _ = save_run(base(), "bnb_dora")
    folder, whole = export(run, "gguf", gguf_type=gguf_type), export(run, "gguf", name="whole", gguf_type="f32")
    found, wanted, kinds = tensors_of(folder), tensors_of(whole), kinds_of(folder)
    for name, tensor in wanted.items():
        assert kinds[name] == ("F32" if tensor.dim() == 1 else gguf_type.upper())
        error = 0 if tensor.dim() == 1 else tensor.abs() * 2.0**-bits + 2.0**-24
        assert ((found[name] - tensor).abs() <= error).all(), name
    coarse = (found["token_embd.weight"] - wanted["token_embd.weight"]).abs() / wanted["token_embd.weight"].abs()
    assert coarse.max() > 2.0 ** -(bits + 2)


def test_eight_bits(save_run, base, export):
    """Q8_0 rounds each weight to half a step of its block of 32; rows that are no whole blocks stay f16."""
    run, model = save_run(base(hidden_size=64, intermediate_size=80), "full")
    folder, whole = export(run, "gguf", gguf_type="q8_0"), export(run, "gguf", name="whole", gguf_type="f32")
    found, wanted, kinds = tensors_of(folder), tensors_of(whole), kinds_of(folder)
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_norm.weight"] == "F32"
    for name in (name for name, kind in kinds.items() if kind == "Q8_0"):
        blocks = wanted[name].unflatten(1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        error = (found[name].unflatten(1, (-1, 32)) - blocks).abs()
        assert (error <= step * (0.5 + 127 * 2.0**-11) * 1.01).all(), name  # the step is stored in fp16
    assert 1e-9 < kl(logits(gguf_stock(folder)), logits(model)) < 1e-3
    assert said(folder)["general.file_type"] == 7


def test_what_the_file_says(save_run, base, export):
    """Hyperparameters, tokens, what ends an answer, what is put before a text, and the template."""
    model = shutil.copytree(base(), base().with_name("ends"))
    set_json_new(model / "generation_config.json", eos_token_id=[297, 40])
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run, _ = save_run(model, "bnb_dora")
    folder, tokenizer = export(run, "gguf"), AutoTokenizer.from_pretrained(run)
    found = said(folder)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 300 == found["llama.vocab_size"]
    assert all(tokens[number] == text for text, number in tokenizer.get_vocab().items())
    assert types == [gguf.TokenType.NORMAL] * 296 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNUSED]
    merges = json.loads((run / "tokenizer.json").read_text())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "gpt-2"
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "eot")}
    assert ids == dict(bos=296, eos=297, padding=298, eot=40)
    assert not found["tokenizer.ggml.add_bos_token"] and not found["tokenizer.ggml.add_eos_token"]
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert (found["llama.rope.dimension_count"], found["llama.attention.head_count_kv"]) == (16, 2)
    assert str(folder.parent) not in str({key: value for key, value in found.items() if key != "tokenizer.ggml.tokens"})


def test_the_demo_begins_with_a_token(export):
    """A tokenizer that puts a token before each text says so; its digits stand alone."""
    found = said(export("demo", "gguf"))
    assert found["tokenizer.ggml.add_bos_token"] and found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.pre"] == "smollm"


SPLITS = {
    "gpt-2": lambda: split_by(gpt2_split()),
    "smollm": lambda: split_by(pre_tokenizers.Digits(individual_digits=True), gpt2_split()),
    "llama-bpe": lambda: split_by(*split_regex(LLAMA3_SPLIT), ignore_merges=True),
    "smaug-bpe": lambda: split_by(*split_regex(LLAMA3_SPLIT)),
    "qwen2": lambda: split_by(*split_regex(QWEN2_SPLIT)),
    "tekken": lambda: split_by(*split_regex(TEKKEN_SPLIT), ignore_merges=True),
}


@pytest.mark.parametrize("name", SPLITS)
def test_pre_tokenizers(save_run, base, export, name):
    """Each way to split text has llama.cpp's name for it."""
    run, _ = save_run(base("llama", tokenizer=SPLITS[name]()), "bnb_dora")
    assert said(export(run, "gguf"))["tokenizer.ggml.pre"] == name


def joined(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece as llama.cpp has it: of all neighbours that are a token together, the best score first."""
    ids, parts = {token: number for number, token in enumerate(tokens)}, list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, first = min(pairs)
        parts[first : first + 2] = ["".join(parts[first : first + 2])]
    as_bytes = lambda part: [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return [number for part in parts for number in ([ids[part]] if part in ids else as_bytes(part))]


def test_sentencepiece(save_run, base, export, tmp_path):
    """Scores that come from merges join text as the tokenizer does; what it has no piece for are bytes."""
    tokenizer = sentencepiece_tokenizer(tmp_path / "pieces")
    run, _ = save_run(base("llama", tokenizer=tokenizer, vocab_size=460), "bnb_dora")
    found = said(export(run, "gguf"))
    tokens, scores, types = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"]
    assert types[:3] == [gguf.TokenType.CONTROL] * 3 and types[3] == gguf.TokenType.BYTE
    for text in TEXTS:
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert joined(text if text.startswith(" ") else " " + text, tokens, scores) == wanted, text


def test_what_llama_cpp_does_not_compute(save_run, tiny, base, export, tmp_path):
    """Other architectures, activations, rotary embeddings and tokenizers are one line each, before a folder is made."""
    odd_split = split_by(*split_regex(r"\p{L}+"))
    apart = split_by(gpt2_split())
    content = json.loads(apart.backend_tokenizer.to_str())
    content["normalizer"] = dict(type="Lowercase")
    apart = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="</s>")
    dynamic = dict(rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))
    refused = [
        (tiny("gemma"), r"gemma is none of llama, mistral, qwen2, qwen3; use --infer_type merged"),
        (tiny("phi3"), r"phi3 is none of"),
        (base("llama", hidden_act="gelu"), r"no llama with hidden_act gelu"),
        (base("llama", **dynamic), r"no llama with rope_type dynamic"),
        (base("qwen3", attention_bias=True), r"no qwen3 with attention_bias True"),
        (base("llama", tokenizer=byte_tokenizer()), r"a vocabulary without merges"),
        (base("llama", tokenizer=odd_split), r"split by \{"),
        (base("llama", tokenizer=apart), r"normalizer Lowercase"),
        (base("llama", vocab_size=280), r"an id \d+ .*, and the model 280 embeddings"),
    ]
    for model, message in refused:
        with pytest.raises(UserError, match=message) as error:
            export(model, "gguf")
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_f16_cannot_hold(base, export, tmp_path):
    """They are refused with the way out, and nothing stays."""
    model = shutil.copytree(base(), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = 7e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--gguf_type f16: output.weight has numbers above 65504.*use bf16"):
        export(model, "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tensors_of(export(model, "gguf", gguf_type="bf16"))["output.weight"][3, 4] == pytest.approx(7e4, rel=0.008)


def test_flags(base, export):
    """Flags of other formats are refused, and so is this one's elsewhere."""
    for infer_type, flag in (("merged", "gguf_type"), ("gguf", "dtype"), ("gguf", "max_shard_size")):
        value = dict(gguf_type="f16", dtype="fp32", max_shard_size="1GB")[flag]
        with pytest.raises(ConfigError, match=f"--{flag}: has no meaning for --infer_type {infer_type}"):
            export(base(), infer_type, **{flag: value})


def test_report(save_run, base, export, capsys):
    """The report is of the file as transformers reads it; where it reads something else, there is none."""
    run, _ = save_run(base(), "bnb_dora", context_length=128)
    folder = export(run, "gguf", fidelity_samples=4)
    found = json.loads((folder / "fidelity.json").read_text())
    assert found["exported"]["kl"] < 1e-5 and found["base"]["kl"] > 1e-3
    export(run, "gguf", fidelity_samples=4, overwrite=True)  # a folder that holds a file of this kind alone
    assert describe(folder).kind == "stock"
    with pytest.raises(UserError, match="quantized for serving already"):
        export(folder, "merged", name="again")
    scaled, _ = save_run(base("llama", **LLAMA3), "bnb_dora", context_length=128)
    assert not (export(scaled, "gguf", name="scaled", fidelity_samples=4) / "fidelity.json").exists()
    assert "no fidelity report: transformers does not read llama3 scaling" in capsys.readouterr().out


def test_a_base_of_gguf_alone(base, export, tmp_path):
    """Neither training nor an export begins with one: the line says how to convert it, and what it says works."""
    folder = export(base(), "gguf", gguf_type="f32")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(folder / "model.gguf", foreign / "some-Q8_0.gguf")
    opens = (describe, lambda name: read_model_config(str(name), task=CAUSAL_LM))
    for given in (foreign, foreign / "some-Q8_0.gguf"):
        for read in opens:
            with pytest.raises(
                UserError, match=r"its weights are GGUF \(some-Q8_0.gguf\); convert them first"
            ) as error:
                read(given)
            assert "\n" not in str(error.value)
    loaded = gguf_stock(folder)
    loaded.save_pretrained(tmp_path / "converted")
    assert torch.equal(logits(stock(tmp_path / "converted")), logits(stock(base())))


# ---------------------------------------------------------------------------------------------------------------------
# The program that the format belongs to
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it compiles for minutes")


@pytest.mark.parametrize("family, config", CASES, ids=str)
def test_llama_cpp_computes_it(llama_cpp, save_run, base, export, family, config):
    """Its logits are those of the trained model."""
    run, model = save_run(base(family, **config), "bnb_dora")
    file = export(run, "gguf", gguf_type="f32") / "model.gguf"
    reader = llama_cpp.Llama(str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    ids = torch.randint(0, 250, (1, 100), generator=torch.Generator().manual_seed(0))
    reader.eval(ids[0].tolist())
    found = torch.tensor(reader.scores[: ids.shape[1]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0].float()
    torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece"])
def test_llama_cpp_reads_text(llama_cpp, save_run, base, export, tmp_path, name):
    """It splits texts of several scripts into the ids that the model was trained on."""
    tokenizer = SPLITS[name]() if name in SPLITS else sentencepiece_tokenizer(tmp_path / "pieces")
    vocab_size = 300 if name in SPLITS else 460
    run, _ = save_run(base("llama", tokenizer=tokenizer, vocab_size=vocab_size), "bnb_dora")
    reader = llama_cpp.Llama(str(export(run, "gguf") / "model.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        if name == "sentencepiece":  # before which llama.cpp always puts one, transformers where there is none
            text = text.removeprefix(" ")
        found = reader.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text
