"""Opening runs and evaluating them: the model that answers is the model that was trained."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from real_run import logits, make_config, plan, set_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import evaluate
from evaluate import EvalConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.core.rows import local
from fsdp_utils.data.encode import TextEncoder
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.inference import engine, generation
from fsdp_utils.inference.asking import make_asking
from fsdp_utils.inference.load import check_eval_type, load_for_inference
from fsdp_utils.inference.scoring import NEXT_PROMPTS
from fsdp_utils.model import attention
from fsdp_utils.model.build import read_model_config, read_tokenizer
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from methods import method_of
from methods.dora import DoRALinear
from methods.lora import LoRALinear
from methods.quantizers.linear import QuantizedLinear, weight_rows
from methods.targets import replace_module
from scripts.block_expansion import Expansion, expand

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dora(save_run, tiny):
    """The folder of a bnb_dora run."""
    return save_run(tiny(), "bnb_dora")[0]


@pytest.fixture
def broken(dora, tmp_path):
    """A copy of the bnb_dora run to damage."""
    return shutil.copytree(dora, tmp_path / "broken")


def opened(folder, **options):
    return load_for_inference(describe(folder), device=CPU, **options)


@torch.no_grad()
def merged(model):
    """The model with every quantized or adapted linear replaced by an nn.Linear of the same weight."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | QuantizedLinear) and ".base_layer" not in path:
            base = getattr(module, "base_layer", module)
            weight = weight_rows(base, local, dtype=torch.float32)
            if isinstance(module, LoRALinear):
                weight = weight + module.scaling * (module.lora_B.double() @ module.lora_A.double()).float()
                if isinstance(module, DoRALinear):
                    weight = weight * (module.magnitude() / weight.norm(dim=1)).unsqueeze(1)
            linear = torch.nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            linear.weight.copy_(weight)
            if base.bias is not None:
                linear.bias.copy_(base.bias)
            replace_module(model, path, linear)
    return model


@pytest.mark.parametrize("train_type", ["bnb_dora", "hqq_lora", "qlora", "dora"])
def test_adapter_is_what_was_trained(save_run, tiny, train_type):
    """The unmerged adapter over its base gives the logits that the run had, and so do the merged weights."""
    folder, trained = save_run(tiny("qwen2"), train_type)
    expected = logits(trained)
    run = describe(folder)
    assert (run.kind, run.train_type, run.rank) == ("adapter", train_type, 4)
    assert method_of(train_type)(run.config).scaling == 4.0
    assert run.dora == train_type.endswith("dora")
    model = opened(folder)
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    if train_type != "qlora":  # PEFT's layers, which merge themselves
        torch.testing.assert_close(logits(merged(model)), expected, atol=1e-4, rtol=0)


def test_other_folders(save_run, tiny, tmp_path):
    """Full, Llama-Pro and base folders open densely; a full one can be quantized after training."""
    folder, trained = save_run(tiny(), "full")
    expected = logits(trained)
    assert (describe(folder).kind, describe(tiny()).kind) == ("model", "base")
    torch.testing.assert_close(logits(opened(folder)), expected)
    quantized = opened(folder, eval_type="full_post_quantized")
    assert sum(isinstance(m, QuantizedLinear) for m in quantized.modules()) == 14
    assert (logits(quantized) - expected).abs().max() > 1e-3

    expand(Expansion(model_name=str(tiny()), output_dir=str(tmp_path / "pro"), num_new_blocks=1))
    pro, trained = save_run(tiny(), "bnb_llama_pro", llama_pro_path=tmp_path / "pro")
    expected = logits(trained)
    assert describe(pro).kind == "llama_pro"
    torch.testing.assert_close(logits(opened(pro)), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(opened(pro, eval_type="bnb_llama_pro")), expected, atol=1e-5, rtol=0)
    requantized = opened(pro, eval_type="hqq_llama_pro")
    assert sum(isinstance(m, QuantizedLinear) for m in requantized.modules()) == 14  # the new block stays dense
    (pro / "expanded_layers.json").unlink()
    with pytest.raises(UserError, match="no expanded_layers"):
        describe(pro)


def test_foreign_adapter(save_run, tiny, tmp_path):
    """A PEFT adapter without run.json is computed over the base as it is, or as --eval_type says."""
    saved, trained = save_run(tiny(), "custom_qlora")
    folder, expected = shutil.copytree(saved, tmp_path / "foreign"), logits(trained)
    (folder / "run.json").unlink()
    assert describe(folder).base_fingerprint is None
    assert (logits(opened(folder)) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(opened(folder, eval_type="qlora")), expected, atol=1e-5, rtol=0)
    harmless = dict(init_lora_weights="gaussian", megatron_core="megatron.core", peft_version="0.21.0")
    set_json(folder / "adapter_config.json", **harmless)
    describe(folder)
    changing = dict(init_lora_weights="pissa", alora_invocation_tokens=[5], a_later_feature=0.5)
    for key, value in changing.items():
        original = (folder / "adapter_config.json").read_text()
        set_json(folder / "adapter_config.json", **{key: value})
        with pytest.raises(UserError, match=key):
            describe(folder)
        (folder / "adapter_config.json").write_text(original)


def test_stock_folders(tiny, tmp_path):
    """What transformers and PEFT can load opens through them: an NF4 folder, and an adapter kept in or beside it."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stock = AutoModelForCausalLM.from_pretrained(tiny(), quantization_config=quantization, dtype=torch.float32)
    stock.save_pretrained(tmp_path / "nf4")
    assert describe(tmp_path / "nf4").kind == "stock"
    torch.testing.assert_close(logits(opened(tmp_path / "nf4", dtype=torch.float32)), logits(stock))

    adapted = get_peft_model(stock, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.peft_config["default"].base_model_name_or_path = "../nf4"
    expected = logits(adapted)
    for folder in (tmp_path / "beside", tmp_path / "nf4" / "adapter"):
        adapted.save_pretrained(folder)
    for folder in (tmp_path / "beside", tmp_path / "nf4"):
        assert describe(folder).kind == "stock_adapter"
        torch.testing.assert_close(logits(opened(folder, dtype=torch.float32)), expected)
    with pytest.raises(UserError, match="--eval_type qlora"):
        opened(tmp_path / "nf4", eval_type="qlora")


DAMAGES = {
    "its base /nowhere/base is gone": lambda f: (
        set_json(f / "adapter_config.json", base_model_name_or_path="/nowhere/base"),
        set_json(f / "run.json", flags=json.loads((f / "run.json").read_text())["flags"] | {"model_name": "/nowhere"}),
    ),
    "did not finish .*train it again": lambda f: set_json(f / "run.json", finished=False),
    "did not finish .*finish it by --resume auto": lambda f: (
        set_json(f / "run.json", finished=False),
        (f / "checkpoints" / "step-2").mkdir(parents=True),
        (f / "checkpoints" / "step-2" / "manifest.json").write_text("{}"),
    ),
    "holds no weights": lambda f: set_json(f / "run.json", saved=False),
    "run.json: not valid JSON": lambda f: (f / "run.json").write_text("{"),
    "without adapter_model.safetensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "says r = 8": lambda f: set_json(f / "adapter_config.json", r=8),
    "names no known train_type": lambda f: set_json(f / "run.json", flags=[]),
    "use_dora False does not fit": lambda f: set_json(f / "adapter_config.json", use_dora=False),
    "truncated or corrupt": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-10]
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_folders(broken, message):
    """What is wrong with a folder is said in one line before any weight is read."""
    DAMAGES[message](broken)
    with pytest.raises(UserError, match=message) as error:
        describe(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "some/where/else"])
def test_missing_folders(name):
    """A name that can only be a folder is said to be missing, not looked for on the hub."""
    for read in (describe, partial(read_model_config, task=CAUSAL_LM), read_tokenizer):
        with pytest.raises(UserError, match=f"^{name}: no such folder$"):
            read(name)


def test_attention_of_training_is_left_behind(broken, monkeypatch):
    """An attention that this machine lacks, or that knows neither a cache nor padding, is not the run's concern."""
    trained_with = json.loads((broken / "run.json").read_text())["flags"]
    set_json(broken / "run.json", flags=trained_with | dict(packing=True, attn_implementation="flash_attention_2"))
    assert opened(broken).config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention, "supported", lambda *args, **kwargs: True)  # as on CUDA
    names = ("model_name", "train_type")
    config = make_config(**{name: trained_with[name] for name in names})
    assert plan(config).model.config._attn_implementation == attention.NAME
    assert opened(broken).config._attn_implementation == "sdpa"


def test_tensors_that_do_not_fit(broken, tiny):
    """A missing, superfluous or wrongly shaped tensor, and a base that is not the one trained on, are refused."""
    path, tensors = broken / "adapter_model.safetensors", load_file(broken / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    short = name.removeprefix("base_model.model.")
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"{short} is missing"),
        (tensors | {name: tensors[name][:, :-1].contiguous()}, f"{short} has shape"),
        (tensors | {name.replace("layers.0", "layers.9"): tensors[name].clone()}, "has no place"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            opened(broken)
    save_file(tensors, path)
    set_json(broken / "adapter_config.json", base_model_name_or_path=str(tiny(tie_word_embeddings=True)))
    with pytest.raises(UserError, match="is not the base it was trained on"):
        opened(broken)


def test_eval_type_that_does_not_fit(dora, tiny):
    """--eval_type cannot make a DoRA adapter a LoRA, nor a model an adapter."""
    for folder, eval_type in ((dora, "qlora"), (dora, "full"), (tiny(), "bnb_dora"), (tiny(), "bnb_llama_pro")):
        with pytest.raises(UserError, match=f"--eval_type {eval_type}"):
            check_eval_type(describe(folder), eval_type)


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(dora):
    run = describe(dora)
    model = load_for_inference(run, device=CPU)
    return generation.HFGenerator(model, tokenizer_of(run), max_new_tokens=12, temperature=0.0, seed=0)


@pytest.fixture
def prompts(generator):
    texts = ["a", "How many are 3 and 4?", "###Question:\nlong " * 4, "bcd", "x y z 1 2 3"]
    return list(enumerate(TextEncoder(generator.tokenizer).prompts(texts)))


def answers(generator, prompts, **options):
    return {o.index: (o.text, o.tokens) for o in generator.answers(prompts, **{"batch_size": 8, **options})}


def test_batches_equal_single_prompts(generator, prompts):
    """Left padding, sorting and the KV cache do not change greedy answers: each is the argmax of the full forward."""
    together = answers(generator, prompts)
    assert together == answers(generator, prompts, batch_size=1)
    for index, ids in prompts:
        grown = list(ids)
        for _ in range(together[index][1]):
            with torch.no_grad():
                grown.append(generator.model(input_ids=torch.tensor([grown])).logits[0, -1].argmax().item())
        assert generator.tokenizer.decode(grown[len(ids) :], skip_special_tokens=True) == together[index][0]


def test_sampling_is_seeded(generator, dora, prompts):
    """Sampled answers differ from greedy ones and repeat, whatever was asked before."""
    run = describe(dora)
    model = load_for_inference(run, device=CPU)
    sampling = generation.HFGenerator(model, generator.tokenizer, max_new_tokens=12, temperature=1.0, seed=0)
    first = answers(sampling, prompts)
    assert first != answers(generator, prompts)
    assert first == answers(sampling, prompts)


def test_batch_that_does_not_fit_is_halved(generator, prompts, monkeypatch, capfd):
    """Out of memory costs speed, not the evaluation; only a single prompt that does not fit ends it."""
    expected, generate = answers(generator, prompts), generator.model.generate

    def limited(largest):
        def run(*, input_ids, **kwargs):
            if len(input_ids) > largest:
                raise torch.OutOfMemoryError("out of memory")
            return generate(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(generator.model, "generate", run, raising=False)

    limited(2)
    assert answers(generator, prompts) == expected
    assert "going on with 2" in "".join(capfd.readouterr())
    limited(0)
    with pytest.raises(UserError, match="does not fit"):
        answers(generator, prompts)


def test_generation_ends(generator, prompts, monkeypatch):
    """A row ends at any end token, and once it asks a question of its own; its padding is not counted."""
    assert generator._until_end([5, 257, 258, 258]) == [5, 257]
    assert generator._until_end([5, 6, 258]) == [5, 6]
    prompt, plain, marked = generator.tokenizer(["###Question", "14 letters now", "5\n###Question:"])["input_ids"]
    stop = generation.NextPrompt(generator.marks, start=len(prompt))
    assert stop(torch.tensor([prompt + plain, prompt + marked]), None).tolist() == [False, True]
    monkeypatch.setattr(generator.model.generation_config, "max_new_tokens", 10_000)
    with pytest.raises(UserError, match="--max_new_tokens 10000"):
        answers(generator, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(dora, tiny_data, tmp_path):
    return EvalConfig(
        model=str(dora),
        dataset=str(tiny_data),
        samples=6,
        n_shots=1,
        batch_size=2,
        max_new_tokens=4,
        device="cpu",
        output_file=str(tmp_path / "result.json"),
    )


def result_of(config):
    evaluate.main(config)
    with open(config.output_file) as file:
        return json.load(file)


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_gib")} for row in rows]


def test_interrupted_evaluation_goes_on(config, tmp_path, interrupt_evaluation):
    """After an interruption only the rest is asked, a torn line is forgotten, and the result is the same."""
    expected = result_of(config)
    assert expected["total"] == 6
    assert [row["index"] for row in expected["results"]] == list(range(6))
    other = replace(config, output_file=str(tmp_path / "other.json"), batch_size=1)
    asked = interrupt_evaluation(at=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(other)
    partial = tmp_path / "other.json.partial"
    with open(partial, "a") as file:
        file.write('{"key": "torn')
    partial.rename(tmp_path / "other.json.partial.1")  # as if another process had written it
    with pytest.raises(UserError, match="other settings"):
        evaluate.main(replace(other, max_new_tokens=5))
    found = result_of(other)
    assert without_times(found["results"]) == without_times(expected["results"])
    assert len(asked) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "result.json"]
    with pytest.raises(UserError, match="exists"):
        evaluate.main(other)


def test_two_evaluations_of_one_name(config, tmp_path, monkeypatch):
    """While one is under way another of its name is refused, whatever its settings; answers that vanish are missed."""
    real, others = evaluate.scored, [dict(), dict(max_new_tokens=5), dict(overwrite=True)]

    def meanwhile(question, output, **more):
        for changes in others:
            with pytest.raises(UserError, match=r"--output_file .*result\.json: another process is writing it"):
                evaluate.main(replace(config, **changes))
        return real(question, output, **more)

    monkeypatch.setattr(evaluate, "scored", meanwhile)
    assert result_of(config)["total"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    def removed(question, output, **more):
        (tmp_path / "other.json.partial").unlink(missing_ok=True)
        return real(question, output, **more)

    monkeypatch.setattr(evaluate, "scored", removed)
    with pytest.raises(UserError, match=r"holds 0 of 6 answers"):
        evaluate.main(replace(config, output_file=str(tmp_path / "other.json")))
    assert not (tmp_path / "other.json").exists()


def test_padding_that_the_model_does_not_know(generator, prompts):
    """Llama-2's tokenizer with an added padding token: batches of several lengths are padded with one it knows."""
    tokenizer = copy.deepcopy(generator.tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(60)])  # past the rows that the model has to spare
    settings = dict(max_new_tokens=12, temperature=0.0, seed=0)
    texts = lambda of: {index: text for index, (text, _) in answers(of, prompts).items()}
    expected = texts(generation.HFGenerator(generator.model, copy.deepcopy(tokenizer), **settings))
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id >= generator.model.config.vocab_size
    assert texts(generation.HFGenerator(generator.model, tokenizer, **settings)) == expected


def test_processes_share_the_questions(config, pair, tmp_path):
    """Two processes give the answers of one, each question asked once."""
    expected = result_of(config)
    both = replace(config, output_file=str(tmp_path / "both.json"))
    pair.run(evaluate.main, both)
    found = json.loads((tmp_path / "both.json").read_text())
    assert without_times(found["results"]) == without_times(expected["results"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.json", "result.json"]


def test_merged_folder_answers_alike(config, tmp_path):
    """The quantized base with the unmerged adapter and the merged model give the same answers."""
    model = merged(opened(config.model))
    model.save_pretrained(tmp_path / "merged")
    tokenizer_of(describe(config.model)).save_pretrained(tmp_path / "merged")
    both = [
        result_of(replace(config, model=str(m), output_file=str(tmp_path / f"{i}.json")))
        for i, m in enumerate((config.model, tmp_path / "merged"))
    ]
    assert without_times(both[0]["results"]) == without_times(both[1]["results"])
    assert [r["kind"] for r in both] == ["adapter", "base"]


@pytest.fixture(scope="module")
def asked_of(tiny):
    """`asked_of(**flags)`: the questions of these flags, and the texts of their prompts."""
    run = describe(tiny())
    tokenizer = tokenizer_of(run)

    def get(**flags):
        made = make_asking(EvalConfig(**flags), run, tokenizer)
        return made.questions, [tokenizer.decode(prompt.ids) for prompt in made.prompts]

    return get


def test_questions_and_shots(tmp_path, asked_of):
    """Shots are fixed by the seed, come from the training split, and are never among the questions."""
    asked, prompts = asked_of(dataset="demo", samples=20, n_shots=5)
    assert len(asked) == 20 and all(prompt.count("###Question:\n") == 6 for prompt in prompts)
    assert prompts == asked_of(dataset="demo", samples=20, n_shots=5)[1]
    assert prompts != asked_of(dataset="demo", samples=20, n_shots=5, seed=1)[1]
    shots = prompts[0].rpartition("###Question:\n")[0]
    assert all(prompt.startswith(shots) for prompt in prompts)
    assert not any(row.question in shots for row in asked)
    local = tmp_path / "d.jsonl"
    local.write_text("".join(json.dumps({"question": f"q{i}?", "answer": f"{i}"}) + "\n" for i in range(4)))
    asked, prompts = asked_of(dataset=str(local), samples=3, n_shots=1)
    assert [row.question for row in asked] == ["q0?", "q1?", "q2?"]
    expected = "###Question:\nq3?\n###Answer:\n3\n\n###Question:\nq0?\n###Answer:\n"
    assert prompts[0].removeprefix("<s>") == expected
    with pytest.raises(UserError, match="--n_shots 2"):
        asked_of(dataset=str(local), samples=3, n_shots=2)


def test_wrong_input(tmp_path, config, asked_of):
    """A dataset without answers, an unknown model and a missing vLLM are one line each."""
    local = tmp_path / "d.jsonl"
    local.write_text('{"question": "1?", "answer": " "}\n')
    with pytest.raises(UserError, match="row 1: has no answer"):
        asked_of(dataset=str(local))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither a model"):
        evaluate.main(replace(config, model=str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"--output_file .*d\.jsonl is a file"):
        evaluate.main(replace(config, output_file=str(local / "result.json")))
    with pytest.raises(UserError, match=r"--output_file .*empty: is no file"):
        evaluate.main(replace(config, output_file=str(tmp_path / "empty"), overwrite=True))
    with pytest.raises(UserError, match="--temperature 1e-40"):
        parse(EvalConfig, ["--temperature=1e-40"], prog="evaluate.py")
    with pytest.raises(UserError, match="vLLM is not installed"):
        evaluate.main(replace(config, backend="vllm"))


def test_vllm_gets_only_what_it_can_compute(dora, monkeypatch):
    """vLLM would refuse DoRA, and would put an adapter on a base that was not quantized as in training."""
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    run = describe(dora)
    with pytest.raises(UserError, match="DoRA"):
        engine.check_vllm(run, None)
    with pytest.raises(UserError, match="that we quantized"):
        engine.check_vllm(replace(run, adapter=run.adapter | {"use_dora": False}), None)


def test_vllm_is_told_what_the_others_are(config, tiny, monkeypatch, capsys):
    """Length, ends and texts that end an answer; flags that are not given are left to it, and it ends before the score
    is printed."""
    seen, said = {}, SimpleNamespace(text="4 ###Question", token_ids=[1, 2])

    class LLM:
        def __init__(self, **options):
            seen.update(options)
            core = SimpleNamespace(shutdown=lambda: print("engine ended"))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def generate(self, inputs, sampling, *, lora_request):
            seen.update(prompts=inputs, sampling=sampling)
            return [SimpleNamespace(outputs=[said]) for _ in inputs]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **given: given)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=None))
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    result = result_of(replace(config, model=str(tiny()), backend="vllm", gpu_memory_utilization=0.5, dtype="fp32"))
    lines = capsys.readouterr().out.strip().splitlines()
    assert (seen["gpu_memory_utilization"], seen["dtype"]) == (0.5, "float32") and "max_model_len" not in seen
    assert seen["sampling"]["stop"] == list(NEXT_PROMPTS) and seen["sampling"]["stop_token_ids"] == [257]
    assert seen["sampling"]["max_tokens"] == 4
    expected = make_asking(config, describe(tiny()), tokenizer_of(describe(tiny()))).prompts
    assert [given["prompt_token_ids"] for given in seen["prompts"]] == [prompt.ids for prompt in expected]
    assert {row["prediction"] for row in result["results"]} == {"4"} and result["peak_memory_gib"] is None
    assert "engine ended" in lines and lines[-1].startswith("score ") and "GiB" not in lines[-1]
