"""Our LoRA and DoRA against PEFT's own: the same start, data and optimizer give the same gradients and loss curve."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from runs import dequantized, make_config, perturb, prepared
from test_launch import losses
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.model.assemble import plan
from fsdp_utils.model.build import read_tokenizer
from fsdp_utils.training.step import micro_step

STEPS = 200
PARTS = {"lora_A.default.weight": "lora_A", "lora_B.default.weight": "lora_B"}
PARTS["lora_magnitude_vector.default.weight"] = "magnitude_delta"  # m = weight_norm + delta: the same gradient


@pytest.fixture(params=["custom_qlora", "bnb_dora"])
def config(request, tiny, tiny_data, tmp_path):
    more = dict(lr=1e-3, wd=0, batch_size=4, max_steps=STEPS, use_gradient_checkpointing=False, log_to="stdout")
    return make_config(
        model_name=tiny(), dataset=tiny_data, train_type=request.param, lora_alpha=16, output_dir=tmp_path, **more
    )


def peft_twin(model, method, config, *, magnitudes: bool):
    """PEFT's adapter on transformers' model with the dequantized base of `model`, and the same A and B."""
    stock = AutoModelForCausalLM.from_pretrained(config.source, dtype=torch.float32)
    assert not stock.load_state_dict(dequantized(model), strict=False).unexpected_keys
    names = sorted({path.split(".")[-1] for path in method.layers(model)})
    settings = dict(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=0.0)
    twin = get_peft_model(stock, LoraConfig(target_modules=names, use_dora=config.method == "dora", **settings))
    start = {f"base_model.model.{name}": t.detach().clone() for name, t in method.adapter_tensors(model)}
    if not magnitudes:
        start = {name: tensor for name, tensor in start.items() if "magnitude" not in name}
    set_peft_model_state_dict(twin, start)
    return twin.train()


def twin_loss(twin, batch) -> torch.Tensor:
    """Mean cross entropy over the label tokens of a batch, written down without our code."""
    logits = twin(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def data_of(config, model):
    """`(tokenized, tokenizer, the batch of every step)` of a run."""
    tokenizer = read_tokenizer(config.source)
    tokenized = train.prepare_data(config, tokenizer, model.config)
    batches = [batch for (batch,) in train.steps_of(config, tokenized, tokenizer, total=STEPS)]
    return tokenized, tokenizer, batches


def test_peft_layers_attach_in_silence(tiny):
    """qlora puts PEFT's own layers on our packed linears, as PEFT's hook allows; its doubts are no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan(make_config(model_name=tiny(), train_type="qlora"), device=torch.device("cpu"))


def test_gradients(config):
    """Of A, B and the magnitude, at the same point with B off zero: within 1e-4 of the largest entry."""
    model, planned, mesh, device = prepared(config)
    perturb(model)
    planned.method.after_step(model, device=device)
    twin = peft_twin(model, planned.method, config, magnitudes=True)
    *_, batches = data_of(config, model)
    run = micro_step(model.train(), config, mesh=mesh, device=device)
    loss = train.mean_loss(*train.backward(model, run, batches[:1], config, device=device, scale=1.0))
    wanted = twin_loss(twin, batches[0])
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in gradients.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        ours = model.get_submodule(path).get_parameter(PARTS[f"lora_{part}"]).grad
        assert gradient.abs().max() > 0
        assert (ours - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_loss_curves(config, tmp_path):
    """Of 200 steps with AdamW in fp32: less than 1e-4 apart everywhere, while the loss falls by much more."""
    model, planned, mesh, device = prepared(config)
    twin = peft_twin(model, planned.method, config, magnitudes=False)  # PEFT's own start of the magnitude
    tokenized, tokenizer, batches = data_of(config, model)
    train.train(model, planned.method, tokenized, tokenizer, config, mesh=mesh, device=device)
    ours = losses(tmp_path)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.wd)
    wanted = []
    for batch in batches:
        loss = twin_loss(twin, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert len(ours) == STEPS
    assert wanted[0] - sum(wanted[-10:]) / 10 > 0.3
    assert max(abs(a - b) for a, b in zip(ours, wanted, strict=True)) < 1e-4
