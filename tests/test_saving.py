"""What a run saves: stock libraries compute the run's logits from it, and no half-written folder looks finished."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from real_run import dequantized, make_config, off_zero, planned_and_prepared
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import as_dict
from fsdp_utils.core.safetensors_io import CheckpointReader, StreamingWriter
from fsdp_utils.folders import saving
from fsdp_utils.model.build import build_on_meta, read_model_config, read_tokenizer
from fsdp_utils.model.weights import fingerprint
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from methods.llama_pro import EXPANDED_LAYERS_FILE
from methods.targets import adapter_targets

IDS = torch.arange(24).view(2, 12) * 7 % 256


def logits_of(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def saved(flags: dict):
    """Saves a model whose trained parameters are off their start; returns its logits and its dequantized weights."""
    config = make_config(save_model=True, **flags)
    planned, run = planned_and_prepared(config)
    model = off_zero(run).model
    tokenizer = read_tokenizer(config.source)
    saving.write_run(config, planned, finished=False)
    saving.save(model, tokenizer, planned, config)
    return logits_of(model), dequantized(model)


def trained(flags: dict):
    """A whole run of train.py that saves; returns what its model computed at the end, as `saved`."""
    config, found = make_config(save_model=True, **flags), []
    original = saving.save

    def save(model, *args):
        original(model, *args)
        found.append((logits_of(model), dequantized(model)))

    saving.save = save
    try:
        train.main(config)
    finally:
        saving.save = original
    return found[0]


def stock_adapter_logits(base, state, folder) -> torch.Tensor:
    """What PEFT computes from `folder` on transformers' own model with the weights of `state`."""
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not stock.load_state_dict(state, strict=False).unexpected_keys
    return logits_of(PeftModel.from_pretrained(stock, folder))


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.versions
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("train_type", ["qlora", "custom_qlora", "bnb_dora", "hqq_dora", "lora", "dora"])
def test_peft_computes_the_runs_logits(pair, tiny, tmp_path, family, train_type):
    """On the dequantized base, to 1e-4; biases, tied heads and fused projections too. 2 processes save 1's bytes."""
    flags = dict(model_name=tiny(family), train_type=train_type)
    logits, state = saved({**flags, "output_dir": tmp_path / "one"})
    stock = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    stock.load_state_dict(state, strict=False)
    assert (logits_of(stock) - logits).abs().max() > 1e-2  # the adapter matters
    assert_close(stock_adapter_logits(tiny(family), state, tmp_path / "one"), logits)
    pair.run(saved, {**flags, "output_dir": tmp_path / "two"})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora"])
def test_trained_adapter(pair, tiny, tiny_data, tmp_path, train_type):
    """The same after real steps of the real loop on 2 processes."""
    flags = dict(model_name=tiny(), train_type=train_type, dataset=tiny_data, batch_size=2, lr=0.01, max_steps=2)
    logits, state = pair.run(trained, {**flags, "output_dir": tmp_path / "out"})[1]
    assert_close(stock_adapter_logits(tiny(), state, tmp_path / "out"), logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"] is True


@pytest.mark.versions
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_full_model_folder(pair, tiny, tmp_path, family):
    """A full fine-tune loads with AutoModelForCausalLM and gives the run's logits; a tied head stays tied."""
    flags = dict(model_name=tiny(family), train_type="full")
    logits, _ = saved({**flags, "output_dir": tmp_path / "one"})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert stock.dtype == torch.float32
    assert_close(logits_of(stock), logits)
    assert stock.config.use_cache  # training switches it off
    tied = stock.get_input_embeddings().weight is stock.get_output_embeddings().weight
    assert tied is (family == "qwen2")
    pair.run(saved, {**flags, "output_dir": tmp_path / "two"})
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
@pytest.mark.parametrize(
    "sharding",
    [
        dict(use_cpu_offload=True),
        dict(sharding_strategy="ddp"),
        dict(sharding_strategy="hybrid_full_shard", hybrid_shard_size=1),
        dict(sharding_strategy="shard_grad_op"),
    ],
    ids=str,
)
def test_sharding_does_not_change_the_files(pair, tiny, tmp_path, train_type, sharding):
    """However the run was sharded or offloaded, 2 processes save the bytes of 1."""
    flags = dict(model_name=tiny("qwen2"), train_type=train_type)
    saved({**flags, "output_dir": tmp_path / "one"})
    pair.run(saved, {**flags, **sharding, "output_dir": tmp_path / "two"})
    (weights,) = (tmp_path / "one").glob("*.safetensors")
    assert (tmp_path / "two" / weights.name).read_bytes() == weights.read_bytes()


@pytest.mark.versions
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_config_is_that_of_the_base(tiny, tmp_path, precision):
    """Nothing that training set (no cache, the attention chosen) stays in config.json; only the dtype may change, and
    what the base says in the words of transformers 5 alone is said in those of version 4 beside them."""
    saved(dict(model_name=tiny(), train_type="full", precision=precision, output_dir=tmp_path / "out"))
    ours, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", tiny()))
    assert ours.pop("dtype") == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    base.pop("dtype")
    older = dict(torch_dtype=dict(fp32="float32", bf16="bfloat16")[precision], rope_theta=10000.0)
    assert ours == base | older


@pytest.fixture(scope="module")
def expanded(tiny, tmp_path_factory):
    """A model of 4 blocks of which 1 and 3 count as new."""
    folder = tmp_path_factory.mktemp("expanded") / "model"
    shutil.copytree(tiny("llama", num_hidden_layers=4), folder)
    (folder / EXPANDED_LAYERS_FILE).write_text(json.dumps({"expanded_layers": [1, 3]}))
    return folder


def test_llama_pro_with_a_quantized_head(tiny, expanded, tmp_path):
    """The folder holds dequantized weights in the dtype of training, though the first parameter is packed bytes."""
    flags = dict(llama_pro_path=expanded, train_type="bnb_llama_pro", quantize_lm_head=True)
    logits, _ = saved({**flags, "output_dir": tmp_path / "one"})
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "one")), logits)


@pytest.mark.versions
@pytest.mark.parametrize("train_type", ["llama_pro", "bnb_llama_pro", "hqq_llama_pro"])
def test_llama_pro_folder(pair, tiny, expanded, tmp_path, train_type):
    """Llama-Pro loads with AutoModelForCausalLM and gives the run's logits; only the new blocks moved."""
    flags = dict(llama_pro_path=expanded, train_type=train_type)
    logits, state = saved({**flags, "output_dir": tmp_path / "one"})
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "one")), logits)
    assert (tmp_path / "one" / EXPANDED_LAYERS_FILE).exists()
    got, base = (CheckpointReader(folder) for folder in (tmp_path / "one", expanded))
    for name in base.names():
        new = ".layers.1." in name or ".layers.3." in name
        want = state.get(name, base.tensor(name))
        assert torch.equal(got.tensor(name), want) is not new, name
    pair.run(saved, {**flags, "output_dir": tmp_path / "two"})
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_run_json(tiny, tiny_data, tmp_path, monkeypatch):
    """Every flag, the versions and the base's fingerprint; nothing from the environment."""
    secrets = dict(HF_TOKEN="hf_sEcReT1", WANDB_API_KEY="wandb-sEcReT2", OPENAI_API_KEY="sk-sEcReT3")
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    config = make_config(
        model_name=tiny(), train_type="custom_qlora", dataset=tiny_data, max_steps=1, output_dir=tmp_path / "out"
    )
    train.main(config)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["flags"].keys() == as_dict(config).keys()
    assert Path(run["flags"]["dataset"]).is_absolute() and run["flags"]["project_name"] == config.project_name
    assert run["flags"]["train_type"] == "custom_qlora" and run["flags"]["lora_rank"] == 8
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    assert {"transformers", "bitsandbytes", "peft"} <= run["versions"].keys()
    assert run["finished"] is True and run["saved"] is False and run["processes"] == 1
    assert run["quantizer"] == dict(quant_type="nf4", group_size=64, scales="fp32")
    assert run["base_fingerprint"] == fingerprint(CheckpointReader(tiny()))
    other = CheckpointReader(tiny("llama", num_hidden_layers=4))
    assert run["base_fingerprint"] != fingerprint(other)
    written = "".join(p.read_text() for p in (tmp_path / "out").iterdir())
    assert not any(value in written for value in secrets.values())


def test_a_run_is_found_from_anywhere(tiny, tiny_data, tmp_path, monkeypatch):
    """A base and a dataset named by relative paths are remembered by absolute ones; names of the hub stay names."""
    shutil.copytree(tiny(), tmp_path / "base")
    shutil.copy(tiny_data, tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    flags = dict(model_name="base", train_type="custom_lora", dataset="data.jsonl", max_steps=1, save_model=True)
    train.main(make_config(**flags, output_dir="out"))
    run, adapter = (json.loads(Path("out", name).read_text()) for name in ("run.json", "adapter_config.json"))
    assert run["flags"]["model_name"] == adapter["base_model_name_or_path"] == str(tmp_path / "base")
    assert run["flags"]["dataset"] == str(tmp_path / "data.jsonl")
    assert saving._lasting("org/name") == "org/name" and saving._lasting("demo") == "demo"


def test_output_folder_rules(tmp_path):
    """A non-empty folder is refused, unless --overwrite; what a run without --save_model left is no result."""
    folder = tmp_path / "out"
    settings = dict(output_dir=folder)
    saving.check_output(make_config(**settings, save_model=True))  # not there yet
    folder.mkdir()
    saving.check_output(make_config(**settings, save_model=True))  # empty
    (folder / "metrics.jsonl").touch()
    saving.check_output(make_config(**settings))
    with pytest.raises(UserError, match="--overwrite true"):
        saving.check_output(make_config(**settings, save_model=True))
    (folder / "adapter_config.json").touch()
    with pytest.raises(UserError, match=f"--output_dir {folder}: .*not empty.*--overwrite true"):
        saving.check_output(make_config(**settings, save_model=True))
    saving.check_output(make_config(**settings, save_model=True, overwrite=True))
    for overwrite in (True, False):
        with pytest.raises(UserError, match=r"holds a model, .*choose another or pass --save_model true"):
            saving.check_output(make_config(**settings, overwrite=overwrite))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "vectors.safetensors").touch()
    with pytest.raises(UserError, match="neither a run nor a model"):
        saving.check_output(make_config(output_dir=tmp_path / "mine", save_model=True, overwrite=True))
    for below in ("metrics.jsonl", "metrics.jsonl/run", "metrics.jsonl/run/1"):
        with pytest.raises(UserError, match="is a file"):
            saving.check_output(make_config(output_dir=folder / below, overwrite=True))


def test_one_run_at_a_time(tiny, tiny_data, tmp_path, monkeypatch):
    """Of two runs that start together on one folder, the second ends before it loads; also if the first is done."""
    flags = dict(model_name=tiny(), train_type="custom_lora", dataset=tiny_data, max_steps=1, save_model=True)
    config = make_config(**flags, output_dir=tmp_path / "out")
    carry_out, said = train.carry_out, []

    def second(*args, **kwargs):
        monkeypatch.setattr(train, "carry_out", carry_out)
        for more in ({}, dict(overwrite=True)):
            with pytest.raises(UserError, match="another process is writing it") as error:
                train.main(make_config(**flags, output_dir=tmp_path / "out", **more))
            said.append(error)
        carry_out(*args, **kwargs)

    monkeypatch.setattr(train, "carry_out", second)
    monkeypatch.setattr(saving, "check_output", lambda config, **_: None)  # both looked before either wrote
    train.main(config)
    assert len(said) == 2 and json.loads((tmp_path / "out/run.json").read_text())["finished"]
    monkeypatch.undo()
    early = iter([lambda config, **_: None])
    check = saving.check_output
    monkeypatch.setattr(saving, "check_output", lambda config, **how: next(early, check)(config, **how))
    with pytest.raises(UserError, match="is not empty"):
        train.main(config)


@pytest.mark.parametrize(("train_type", "nbytes"), [("custom_lora", 10_000), ("full", 100_000)])
def test_a_disk_that_is_too_small(tiny, tiny_data, tmp_path, monkeypatch, train_type, nbytes):
    """Said before the run, not after it."""
    flags = dict(model_name=tiny(), train_type=train_type, dataset=tiny_data, max_steps=1, output_dir=tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=nbytes))
    monkeypatch.setattr(train, "carry_out", lambda *args, **kwargs: pytest.fail("it began"))
    with pytest.raises(UserError, match=r"out: .* GB to write, .* GB free"):
        train.main(make_config(**flags, save_model=True))


@pytest.mark.versions
def test_several_chat_templates(tiny, tmp_path):
    """What transformers saves in a folder is replaced like the rest."""
    source = tmp_path / "model"
    shutil.copytree(tiny(), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    flags = dict(model_name=source, train_type="custom_lora", output_dir=tmp_path / "out", overwrite=True)
    for _ in range(2):
        saved(flags)
    assert set(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template) == {"default", "tool_use"}
    saved({**flags, "model_name": tiny()})
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


def test_output_folder_with_what_is_read(tmp_path):
    """Not even --overwrite lets a run replace the model that it reads."""
    (tmp_path / "model").mkdir()
    for flags in (dict(model_name=tmp_path / "model"), dict(train_type="llama_pro", llama_pro_path=tmp_path / "model")):
        for folder in (tmp_path, tmp_path / "model"):
            with pytest.raises(UserError, match=f"--output_dir {folder}: holds .* which is read"):
                saving.check_output(make_config(**flags, output_dir=folder, overwrite=True))
        saving.check_output(make_config(**flags, output_dir=tmp_path / "model-tuned", overwrite=True))


RESULT_FILES = {"adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"}


@pytest.mark.parametrize("train_type", ["custom_lora", "full"])
def test_interrupted_save_looks_unfinished(tiny, tmp_path, monkeypatch, train_type):
    """Wherever saving stops, the folder has no config of a result whose weights are not all there."""
    flags = dict(model_name=tiny(), train_type=train_type, overwrite=True)
    write, replace = StreamingWriter.write, saving.os.replace
    config_name = "config.json" if train_type == "full" else "adapter_config.json"

    def stop_at(call, function):
        calls = iter(range(10_000))

        def stopping(*args):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*args)

        return stopping

    for call in (0, 3):
        monkeypatch.setattr(StreamingWriter, "write", stop_at(call, write))
        with pytest.raises(KeyboardInterrupt):
            saved({**flags, "output_dir": tmp_path / "writing"})
        assert not RESULT_FILES & {p.name for p in (tmp_path / "writing").iterdir()}
    monkeypatch.setattr(StreamingWriter, "write", write)
    saved({**flags, "output_dir": tmp_path / "moving"})
    complete = {p.name for p in (tmp_path / "moving").iterdir()}
    moves = 0
    for call in range(100):  # each time over the result that the one before left
        monkeypatch.setattr(saving.os, "replace", stop_at(call, replace))
        try:
            saved({**flags, "output_dir": tmp_path / "moving"})
            break
        except KeyboardInterrupt:
            moves += 1
            left = {p.name for p in (tmp_path / "moving").iterdir() if p.name != ".saving"}
            assert config_name not in left or complete <= left
    assert moves >= len(complete) - 1
    monkeypatch.setattr(saving.os, "replace", replace)
    assert {p.name for p in (tmp_path / "moving").iterdir()} == complete


def test_new_result_replaces_an_old_one_of_another_kind(tiny, expanded, tmp_path):
    """--overwrite leaves nothing of an older result that would be read with the new one."""
    folder = tmp_path / "out"
    saved(dict(llama_pro_path=expanded, train_type="llama_pro", output_dir=folder))
    saved(dict(model_name=tiny(), train_type="custom_lora", output_dir=folder, overwrite=True))
    names = {p.name for p in folder.iterdir()}
    assert "adapter_model.safetensors" in names
    assert not names & {"config.json", "model.safetensors", EXPANDED_LAYERS_FILE, "generation_config.json"}
    saved(dict(model_name=tiny(), train_type="full", output_dir=folder, overwrite=True))
    names = {p.name for p in folder.iterdir()}
    assert "config.json" in names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", EXPANDED_LAYERS_FILE}
    (folder / "adapter").mkdir()  # as an export for stock servers has
    (folder / "adapter" / "adapter_config.json").touch()
    saved(dict(model_name=tiny(), train_type="full", output_dir=folder, overwrite=True))
    assert not (folder / "adapter").exists()


TARGETS = {
    ("llama", "all"): {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    ("llama", "all_linear"): {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ("llama", "default"): {"q_proj", "v_proj"},
    ("llama", "q_proj, down_proj"): {"q_proj", "down_proj"},
    ("phi3", "all"): {"qkv_proj", "gate_up_proj", "down_proj"},
    ("phi3", "all_linear"): {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    ("mistral", "default"): {"q_proj", "v_proj"},
    ("gemma", "default"): {"q_proj", "v_proj"},
}


@pytest.mark.versions
@pytest.mark.parametrize(("family", "spec"), TARGETS, ids=str)
def test_targets(tiny, family, spec):
    """Each choice of --lora_target_modules adapts exactly these linears, in every block and never the head."""
    model = build_on_meta(read_model_config(tiny(family), task=CAUSAL_LM), task=CAUSAL_LM, dtype=torch.float32)
    paths = adapter_targets(model, spec)
    assert {path.split(".")[-1] for path in paths} == TARGETS[family, spec]
    assert len(paths) == len(set(paths)) == 2 * len(TARGETS[family, spec])


def test_one_layer_as_target(tiny, tmp_path):
    """A full path adapts one linear alone, and PEFT reads it so."""
    path = "model.layers.1.self_attn.q_proj"
    flags = dict(model_name=tiny(), train_type="bnb_dora", lora_target_modules=path, output_dir=tmp_path / "out")
    logits, state = saved(flags)
    assert_close(stock_adapter_logits(tiny(), state, tmp_path / "out"), logits)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == [path]


def test_no_default_targets(tiny):
    """A family that PEFT has no default for is told so."""
    model = build_on_meta(read_model_config(tiny("phi3"), task=CAUSAL_LM), task=CAUSAL_LM, dtype=torch.float32)
    with pytest.raises(UserError, match="--lora_target_modules default: PEFT has no default for phi3"):
        adapter_targets(model, "default")


@pytest.mark.parametrize("spec", ["q_proj,lin", "lm_head", "self_attn", ","])
def test_target_that_matches_nothing(tiny, spec):
    """Named, with what there is, as an error."""
    model = build_on_meta(read_model_config(tiny(), task=CAUSAL_LM), task=CAUSAL_LM, dtype=torch.float32)
    with pytest.raises(UserError, match=r"--lora_target_modules .*: .*q_proj") as error:
        adapter_targets(model, spec)
    assert len(str(error.value).splitlines()) == 1
