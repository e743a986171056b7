"""What is saved is read by stock software of today and of before: transformers 4.57 in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from all_families import tiny_config
from real_run import logits, make_config, plan, planned_and_prepared, set_json
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fsdp_utils.core.errors import UserError
from fsdp_utils.folders import saving
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.folders.documents import older_words
from fsdp_utils.inference.generation import end_ids
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model.build import read_tokenizer

CPU = torch.device("cpu")
OLDER = "transformers==4.57.6"
ALONG = ("tokenizers>=0.22,<0.23", "huggingface-hub>=0.34,<1")  # the others are those of the newer version
UNREACHED = ("Could not find a version", "No matching distribution", "Connection", "Temporary failure")
LOOK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
def look(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [dict(role="user", content="a b")]
    template = tokenizer.chat_template and tokenizer.apply_chat_template(chat, tokenize=False)
    found = dict(ids=tokenizer(" a  b\\n12")["input_ids"], template=template)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except OSError:  # an adapter's folder
        return found
    return found | dict(logits=model(ids).logits.detach(), ends=model.generation_config.eos_token_id)
for asked in sys.stdin:
    out, *folders = json.loads(asked)
    torch.save(list(map(look, folders)), out)
    print("read", flush=True)
"""


@pytest.fixture(scope="module")
def older(request, tmp_path_factory):
    """`older(*folders)`: what transformers 4.57 reads in each: ids, chat, logits, end tokens."""
    place = request.config.cache.mkdir("transformers-4.57.6")
    if not (place / "complete").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--no-deps", "--target", place]
        done = subprocess.run([str(word) for word in (*install, OLDER, *ALONG)], capture_output=True, text=True)
        if done.returncode and any(words in done.stderr for words in UNREACHED):
            pytest.skip(f"PyPI cannot be reached: {done.stderr.strip().splitlines()[-1]}")
        assert not done.returncode, done.stderr
        (place / "complete").touch()

    scratch = tmp_path_factory.mktemp("older")
    settings = dict(
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=str(place))
    )
    with (scratch / "errors").open("w") as errors:
        reader = subprocess.Popen([sys.executable, "-c", LOOK], stderr=errors, **settings)

    def read(*folders):
        asked = json.dumps([str(path) for path in (scratch / "found.pt", *folders)])
        with suppress(BrokenPipeError):  # it has failed, and says why
            print(asked, file=reader.stdin, flush=True)
        while (line := reader.stdout.readline()) != "read\n":
            assert line, (scratch / "errors").read_text()[-2000:]
        return torch.load(scratch / "found.pt")

    yield read
    reader.kill()
    reader.communicate()


ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE |= dict(original_max_position_embeddings=4)


@pytest.fixture(scope="module")
def written_by_4(tmp_path_factory):
    """A model as transformers 4 wrote it: its words for the rotary embedding, its tokenizer class."""
    folder = tmp_path_factory.mktemp("base") / "written_by_4"
    make_model(folder, rope_parameters=ROPE | dict(rope_theta=500000.0))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= dict(rope_theta=500000.0, rope_scaling=ROPE, torch_dtype="float32", transformers_version="4.40.0")
    (folder / "config.json").write_text(json.dumps(config))
    return as_of_4(folder)


@pytest.fixture(scope="module")
def written_by_5(tmp_path_factory):
    """Models as transformers 5 writes them, with a tokenizer class that version 4 knows."""

    def get(family, **config):
        return as_of_4(make_model(tmp_path_factory.mktemp("base") / family, family, **config))

    return get


def as_of_4(folder):
    set_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


def test_the_demo_is_read_by_an_older_version(older, save_run):
    """The built-in model's results can be served by what people have."""
    folder, trained = save_run("demo", "full")
    (found,) = older(folder)
    torch.testing.assert_close(found["logits"], logits(trained), atol=1e-3, rtol=0)


def test_read_by_an_older_version(older, written_by_4, written_by_5, save_run, export):
    """Models, adapters and exports give transformers 4.57 the logits that the run had, and the same tokens."""
    bases = [written_by_4, written_by_5("gptneox"), written_by_5("llama", rope_parameters=ROPE | dict(rope_theta=5e5))]
    folders, wanted = [], []
    for number, base in enumerate(bases):
        whole, trained = save_run(base, "full")
        adapter, adapted = save_run(base, "custom_lora")
        merged = export(adapter, "merged", dtype="fp32", name=f"merged{number}")
        folders += [whole, adapter, merged]
        wanted += [logits(trained), None, logits(adapted)]
    ids = read_tokenizer(str(written_by_4))(" a  b\n12")["input_ids"]
    for found, expected in zip(older(*folders), wanted, strict=True):
        assert found["ids"] == ids
        if expected is not None:
            torch.testing.assert_close(found["logits"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("train_type", ["full", "custom_lora", "bnb_llama_pro"])
def test_documents_are_those_of_the_base(written_by_4, save_run, export, tmp_path, train_type):
    """The tokenizer is copied byte for byte, config.json keeps the base's words; only the dtype may differ."""
    base, more = written_by_4, {}
    if "llama_pro" in train_type:
        base = tmp_path / "expanded"
        shutil.copytree(written_by_4, base)
        (base / "expanded_layers.json").write_text('{"expanded_layers": [1]}')
        more = dict(llama_pro_path=base)
    folder, _ = save_run(written_by_4, train_type, **more)
    for result in (folder, export(folder, "merged", dtype="bf16")):
        for path in base.glob("tokenizer*"):
            assert (result / path.name).read_bytes() == path.read_bytes()
        if (result / "config.json").exists():
            config, original = (json.loads((f / "config.json").read_text()) for f in (result, base))
            changed = {key for key in config.keys() | original.keys() if config.get(key) != original.get(key)}
            assert changed <= {"dtype", "torch_dtype"}


def test_an_older_result_leaves_no_tokenizer_behind(tiny, tmp_path):
    """Another tokenizer's files beside the new ones would be read with them."""
    config = make_config(model_name=tiny(), output_dir=tmp_path, train_type="full")
    planned, run = planned_and_prepared(config)
    for name in ("vocab.json", "added_tokens.json", "spiece.model"):
        (tmp_path / name).write_text("{}")
    saving.save(run.model, read_tokenizer(config.source), planned, config)
    assert {path.name for path in tmp_path.glob("*[nl]") if "token" in path.name or "model" in path.name} == {
        "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_older_words_do_no_harm(tmp_path, kind):
    """Beside the words of version 5, those of version 4 change nothing of what version 5 reads."""
    try:
        tiny_config(kind).save_pretrained(tmp_path)
    except Exception:  # as many types as families have reasons to want arguments
        pytest.skip(f"{kind}: no default configuration")
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    given = json.loads((tmp_path / "config.json").read_text())
    set_json(tmp_path / "config.json", **older_words(given))
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: value for key, value in after.items() if key in before} == before


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("train_type", ["full", "custom_lora"])
def test_what_training_changed(older, written_by_4, tmp_path, export, train_type):
    """End tokens that were learned and a chat template that was given stand in the result, its exports, and what
    evaluation ends an answer with, in both versions; the base's own stay."""
    base = tmp_path / "base"
    shutil.copytree(written_by_4, base)
    (base / "generation_config.json").write_text('{"eos_token_id": 257, "temperature": 0.5}')
    set_json(base / "tokenizer_config.json", chat_template="old")
    flags = dict(model_name=base, train_type=train_type, save_model=True, output_dir=tmp_path / "run")
    config = make_config(**flags)
    planned, run = planned_and_prepared(config)
    tokenizer = read_tokenizer(config.source)
    tokenizer.learned_ends, tokenizer.given_chat_template, tokenizer.chat_template = (299, 258), TEMPLATE, TEMPLATE
    saving.save(run.model, tokenizer, planned, config)
    saving.write_run(config, planned, finished=True)
    folder = tmp_path / "run"
    merged = export(folder, "merged", dtype="fp32")
    for result in (folder, merged):
        generation = json.loads((result / "generation_config.json").read_text())
        assert generation == {"eos_token_id": [257, 258, 299], "temperature": 0.5}
        described = describe(result)
        assert end_ids(load_for_inference(described, device=CPU), tokenizer_of(described)) == [257, 258, 299]
        assert tokenizer_of(described).chat_template == TEMPLATE
    read = [AutoTokenizer.from_pretrained(result).chat_template for result in (folder, merged)]
    assert read == [TEMPLATE] * 2
    found = older(folder, merged)
    assert [result["template"] for result in found] == ["[user]a b"] * 2
    assert found[1]["ends"] == [257, 258, 299]
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id == [257, 258, 299]


def test_a_damaged_document_is_found_before_training(tiny, tmp_path):
    """What is read only when the result is saved would end a run after its last step."""
    base = tmp_path / "base"
    shutil.copytree(tiny(), base)
    (base / "generation_config.json").write_text("{")
    config = make_config(model_name=base, output_dir=tmp_path / "out", train_type="full", save_model=True)
    planned = plan(config)
    with pytest.raises(UserError, match=r"generation_config\.json: not valid JSON"), saving.begun(planned, config):
        pytest.fail("it began")
