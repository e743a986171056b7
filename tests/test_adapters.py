"""rsLoRA and PiSSA, each for LoRA and DoRA: what PEFT computes, what is saved, and what comes back."""

import json

import pytest
import torch
from closeness import assert_close, assert_learns
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from real_run import batches_of, dequantized, first_step, logits, make_config, off_zero, packed_bytes, plan, prepared
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError
from fsdp_utils.export.trained import TrainedWeights
from fsdp_utils.folders.describe import adapter_tensors, describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model import assemble
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods.lora import LoRALinear
from methods.pissa import PiSSA

CPU = torch.device("cpu")
OPTIONS = [
    dict(use_rslora=True),
    dict(lora_init="pissa"),
    dict(lora_init="pissa", use_rslora=True),
    dict(lora_init="pissa_niter_16"),
]
TRAIN_TYPES = ["custom_lora", "dora", "custom_qlora", "bnb_dora"]
PARTS = {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B"}
PARTS["lora_magnitude_vector.default.weight"] = "magnitude_delta"
CODES = "model.layers.0.self_attn.q_proj.base_layer.codes"


def layers(model) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def peft_init(config):
    """PEFT's own name of the start; its `True` is ours by default, and B must be off zero to learn anything of A."""
    return True if config.lora_init == "default" else config.lora_init


def twin_of(run, config, *, own_start: bool):
    """PEFT's adapter on transformers' model. With its own start it begins from the checkpoint's weights, as we do; else
    it gets our base, dequantized, and our A, B and magnitudes."""
    stock = AutoModelForCausalLM.from_pretrained(config.source, dtype=torch.float32)
    settings = dict(r=config.lora_rank, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora)
    settings |= dict(
        use_dora=config.method == "dora", target_modules=sorted({p.split(".")[-1] for p in layers(run.model)})
    )
    if own_start:
        return get_peft_model(stock, LoraConfig(init_lora_weights=peft_init(config), **settings)).train()
    base = {
        f"{path}.weight": m.base_layer.weight
        for path, m in layers(run.model).items()
        if hasattr(m.base_layer, "weight")
    }
    stock.load_state_dict(base | dequantized(run.model), strict=False)
    twin, start = get_peft_model(stock, LoraConfig(**settings)), {}
    for path, layer in layers(run.model).items():
        tensors = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
        if config.method == "dora":
            tensors["lora_magnitude_vector"] = layer.magnitude()
        start |= {f"base_model.model.{path}.{name}": t.detach().clone() for name, t in tensors.items()}
    set_peft_model_state_dict(twin, start)
    return twin.train()


def assert_same_step(run, twin, config) -> None:
    """Loss to 1e-5, and every gradient to 1e-5 of its largest entry."""
    step = TrainStep(run, config, task=CAUSAL_LM)
    (batch,) = next(batches_of(config, run).first(1))
    loss = step.mean_loss(*step.backward([batch]))
    predicted = twin(input_ids=batch["input_ids"]).logits.flatten(0, 1)[batch["positions"]]
    wanted = F.cross_entropy(predicted, batch["targets"])
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len(gradients) == sum(p.requires_grad for p in run.model.parameters())
    for name, gradient in gradients.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        ours = run.model.get_submodule(path).get_parameter(PARTS[f"lora_{part}"]).grad
        assert gradient.abs().max() > 0
        assert (ours - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("train_type", ["custom_lora", "dora"])
@pytest.mark.parametrize("how", [dict(lora_init="pissa"), dict(lora_init="pissa", use_rslora=True)], ids=str)
def test_pissa_begins_as_pefts(tiny, tiny_data, train_type, how):
    """PEFT's own initialisation of the same weights: A and B, the residual, loss and gradients of the first step."""
    flags = dict(model_name=tiny(), dataset=tiny_data, batch_size=8, lora_alpha=24)
    config = make_config(**flags, train_type=train_type, **how)
    run = prepared(config)
    twin = twin_of(run, config, own_start=True)
    for path, layer in layers(run.model).items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        assert_near(layer.lora_A, theirs.lora_A["default"].weight)
        assert_near(layer.lora_B, theirs.lora_B["default"].weight)
        assert_near(layer.base_layer.weight, theirs.base_layer.weight)
    assert_same_step(run, twin, config)


def assert_near(got, want):
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("how", OPTIONS, ids=str)
def test_peft_computes_the_same(tiny, tiny_data, train_type, how):
    """Off the start, on the same base and with the same A, B and magnitudes: loss and gradients."""
    flags = dict(model_name=tiny("qwen2"), dataset=tiny_data, batch_size=8, lora_alpha=24)
    config = make_config(**flags, train_type=train_type, **how)
    run = off_zero(prepared(config))
    assert_same_step(run, twin_of(run, config, own_start=False), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_the_start_changes_nothing(tiny, train_type, dtype):
    """Step 0 of PiSSA is the base: exactly in 32 bits, also where the checkpoint has 16, and of a quantized one nearer
    than the base quantized whole."""
    base = tiny(dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    error = {}
    for start in ("default", "pissa", "pissa_niter_16"):
        run = prepared(make_config(model_name=base, train_type=train_type, lora_init=start, lora_rank=16))
        error[start] = ((logits(run.model.eval()) - logits(stock)).norm() / logits(stock).norm()).item()
    if train_type in ("custom_lora", "dora"):
        assert max(error.values()) < 1e-5
    else:
        assert max(error["pissa"], error["pissa_niter_16"]) < error["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_is_what_is_quantized(tiny, dtype):
    """Its bytes are those of `W - s B0 A0` in the checkpoint's dtype, quantized: with `--quant_scales auto` no scale
    loses anything. A0 and B0 are the principal part of W."""
    config = make_config(model_name=tiny(dtype=dtype), train_type="bnb_dora", lora_init="pissa", lora_alpha=12)
    run = prepared(config)
    weights = AutoModelForCausalLM.from_pretrained(tiny(dtype=dtype), dtype=torch.float32).state_dict()
    for path, layer in layers(run.model).items():
        whole = weights[f"{path}.weight"]
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        principal = (u[:, :8] * s[:8]) @ vt[:8]
        found = layer.scaling * layer.initial_B @ layer.initial_A
        assert (found - principal).norm() < 1e-5 * principal.norm()
        residual = torch.addmm(whole, layer.initial_B, layer.initial_A, alpha=-layer.scaling).to(dtype)
        for got, want in zip(layer.base_layer.packed(), layer.base_layer.quantizer.quantize(residual), strict=True):
            assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))
        scales = layer.base_layer.scales
        largest = residual.float().unflatten(1, (-1, config.quant_group_size)).abs().amax(-1)
        assert scales.dtype == dtype and torch.equal(scales.float(), largest)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("how", OPTIONS[:3], ids=str)
def test_two_processes_equal_one(pair, flags, train_type, how):
    """Loss and gradients; of packed bases also with parameters in host memory."""
    settings = flags(train_type=train_type, **how)
    alone = first_step(settings)
    assert_learns(alone)
    for more in ({}, dict(use_cpu_offload=True))[: 2 if train_type in ("custom_qlora", "bnb_dora") else 1]:
        for step in pair.run(first_step, {**settings, **more, "batch_size": 4}):
            assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize("train_type", [*TRAIN_TYPES, "hqq_dora"])
@pytest.mark.parametrize("how", OPTIONS, ids=str)
def test_saved_and_opened(save_run, tiny, export, train_type, how):
    """What PEFT makes of the folder is the run: on the unchanged base where that was not quantized, else on the base
    whose residual was rounded. We open it as it was, and so is it merged; --infer_type bnb_dora keeps it apart."""
    folder, trained = save_run(tiny(), train_type, **how)
    expected = logits(trained)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), expected, atol=1e-5, rtol=0)
    stock = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    assert (logits(stock.eval()) - expected).abs().max() > 1e-2  # the adapter matters
    rounded = dequantized(trained)
    for path, layer in layers(trained).items():
        if f"{path}.weight" in rounded and hasattr(layer, "initial_A"):  # PEFT takes it out again
            rounded[f"{path}.weight"] += layer.scaling * layer.initial_B @ layer.initial_A
    stock.load_state_dict(rounded, strict=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.get("use_rslora", False) is how.get("use_rslora", False)
    assert config["r"] == (8 if "lora_init" in how else 4)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(stock, folder).eval()), expected, atol=1e-4, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(export(folder, "merged", dtype="fp32"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval()), expected, atol=1e-4, rtol=0)
    if train_type in ("custom_qlora", "bnb_dora"):
        apart = export(folder, "bnb_dora", name="apart", dtype="fp32")
        assert json.loads((apart / "adapter/adapter_config.json").read_text())["r"] == 4
        base = AutoModelForCausalLM.from_pretrained(apart, dtype=torch.float32)
        served = PeftModel.from_pretrained(base, apart / "adapter").train()  # in eval mode a CPU packs weights anew
        torch.testing.assert_close(logits(served), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("train_type", ["custom_lora", "dora"])
def test_peft_opens_what_was_trained_on_16_bits(save_run, tiny, train_type):
    """A bf16 checkpoint trained in fp32: PEFT adds the saved folder to the fp32 base, and that is the run."""
    folder, trained = save_run(tiny(dtype=torch.bfloat16), train_type, lora_init="pissa")
    stock = AutoModelForCausalLM.from_pretrained(tiny(dtype=torch.bfloat16), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(stock, folder).eval()
    torch.testing.assert_close(logits(theirs), logits(trained), atol=1e-4, rtol=0)


@pytest.mark.parametrize("train_type", ["bnb_dora", "hqq_dora", "custom_lora"])
def test_every_reader_makes_the_same_base(save_run, tiny, train_type):
    """The base under a saved adapter, on a bf16 checkpoint: evaluation's and export's bytes are those of training."""
    folder, trained = save_run(tiny(dtype=torch.bfloat16), train_type, lora_init="pissa")
    opened, exported = load_for_inference(describe(folder), device=CPU), TrainedWeights(describe(folder), device=CPU)
    for path, layer in layers(trained).items():
        again = opened.get_submodule(path).base_layer
        if train_type == "custom_lora":
            wanted, found = (layer.base_layer.weight,), [(again.weight,), (exported.tensor(f"{path}.weight"),)]
        else:
            wanted, found = layer.base_layer.packed(), [again.packed(), exported.packed(path)]
        for tensors in found:
            assert all(torch.equal(bytes_of(got), bytes_of(want)) for got, want in zip(tensors, wanted, strict=True))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("train_type", ["qlora", "lora"])
def test_pefts_own_layers_scale_alike(save_run, tiny, export, train_type):
    """--use_rslora reaches PEFT's layers, the folder and the merge."""
    folder, trained = save_run(tiny(), train_type, use_rslora=True)
    run = describe(folder)
    assert run.adapter["use_rslora"] is True
    merged = AutoModelForCausalLM.from_pretrained(export(folder, "merged", dtype="fp32"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval()), logits(trained), atol=1e-4, rtol=0)


def test_an_adapter_trained_elsewhere(tiny, tmp_path):
    """PEFT's own folder with use_rslora is opened with its scaling."""
    stock = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    settings = dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = get_peft_model(stock, LoraConfig(**settings)).eval()
    theirs.peft_config["default"].base_model_name_or_path = str(tiny())
    theirs.save_pretrained(tmp_path / "theirs")
    opened = load_for_inference(describe(tmp_path / "theirs"), device=CPU)
    torch.testing.assert_close(logits(opened), logits(theirs), atol=1e-5, rtol=0)


def test_the_cache_keeps_residuals_apart(tiny, tmp_path):
    """The packed base under PiSSA is another one: it neither reads nor overwrites that of the unchanged base."""
    flags = dict(model_name=tiny(), train_type="bnb_dora")
    plain, residual = (packed_bytes({**flags, "lora_init": start})[CODES] for start in ("default", "pissa"))
    assert not torch.equal(plain, residual)
    for _ in range(2):
        for start, expected in (("default", plain), ("pissa", residual)):
            cached = packed_bytes({**flags, "lora_init": start, "quantized_cache": tmp_path})
            assert torch.equal(cached[CODES], expected)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("flags", [dict(lora_init="pissa_niter_16"), dict(load_format="dummy")], ids=str)
def test_the_cache_keeps_seeds_apart(tiny, tmp_path, flags):
    """A base that depends on the seed, by a start found at random or weights that are, is read only under that seed."""
    flags = dict(model_name=tiny(), train_type="bnb_dora", **flags)
    plain = {seed: packed_bytes({**flags, "seed": seed})[CODES] for seed in (1, 2)}
    assert not torch.equal(plain[1], plain[2])
    for _ in range(2):
        for seed, expected in plain.items():
            assert torch.equal(packed_bytes({**flags, "seed": seed, "quantized_cache": tmp_path})[CODES], expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_cache_follows_a_saved_adapter(save_run, tiny, tmp_path):
    """The base under an adapter that training goes on with lacks that one's start, whatever this run's own would be;
    it is the base that the first run left in the cache."""
    flags = dict(lora_init="pissa_niter_16", lora_rank=4, quantized_cache=tmp_path)
    folder, trained = save_run(tiny(), "bnb_dora", **flags)
    config = make_config(model_name=tiny(), train_type="bnb_dora", **flags, seed=7)
    expected = bytes_of(trained.get_parameter(CODES))
    assert not torch.equal(bytes_of(prepared(config).model.get_parameter(CODES)), expected)
    planned = plan(config)
    planned.method.begin_as(adapter_tensors(folder), {})
    run = assemble.load(planned, config, mesh=None, device=CPU)
    assert torch.equal(bytes_of(run.model.get_parameter(CODES)), expected)
    assert len(list(tmp_path.iterdir())) == 2


def test_dummies_are_told_apart(tiny):
    """Their fingerprint names all that the values depend on."""
    dummies = lambda **more: make_config(model_name=tiny(), load_format="dummy", **more)
    found = {
        assemble.build(config, task=CAUSAL_LM, device=device).base_fingerprint
        for device in (CPU, torch.device("meta"))
        for config in (dummies(), dummies(seed=7), dummies(precision="bf16"))
    }
    assert len(found) == 6


def test_each_process_decomposes_its_share(pair, tiny):
    """Two processes take turns, and end with the same A0 and B0, though each would find them with a sign of its own."""
    flags = dict(model_name=tiny(), train_type="custom_lora", lora_init="pissa")
    for shares, same in pair.run(decomposed, flags):
        assert shares == 6 and same  # of twelve


def decomposed(flags: dict) -> tuple[int, bool]:
    """How many weights this process decomposed, of which it turned the sign if its rank is odd; and whether the step-0
    logits are still those of the base."""
    from fsdp_utils.core.ranks import rank

    original, calls = PiSSA.principal, []

    def turned(self, path, weight):
        calls.append(1)
        u, s, vt = original(self, path, weight)
        sign = -1 if rank() % 2 else 1
        return sign * u, s, sign * vt

    PiSSA.principal = turned
    try:
        run = prepared(make_config(**flags))
    finally:
        PiSSA.principal = original
    stock = AutoModelForCausalLM.from_pretrained(flags["model_name"], dtype=torch.float32).eval()
    return len(calls), torch.allclose(logits(run.model.eval()), logits(stock), atol=1e-4)


def test_what_cannot_begin_so(tiny):
    """PEFT's own layers, methods without adapters, and a rank that a weight has not: one line each."""
    for train_type in ("qlora", "full", "llama_pro"):
        more = dict(llama_pro_path="x") if train_type == "llama_pro" else {}
        with pytest.raises(ConfigError, match=f"--lora_init pissa: not with {train_type}; use one of custom_lora"):
            make_config(train_type=train_type, lora_init="pissa", **more)
    with pytest.raises(UserError, match=r"--lora_rank 40: --lora_init pissa splits .* of 32 x 64; lower it"):
        prepared(make_config(model_name=tiny(), train_type="bnb_dora", lora_init="pissa", lora_rank=40))
    assert any("--use_rslora has no effect" in note for note in make_config(train_type="full", use_rslora=True).notes())
