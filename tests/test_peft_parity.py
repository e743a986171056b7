"""Our LoRA and DoRA against PEFT's own: the same start, data and optimizer give the same gradients and loss curve."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from commands import losses
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from real_run import batches_of, dequantized, make_config, off_zero, plan, prepared
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep

STEPS = 120
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
    twin = get_peft_model(stock, LoraConfig(**method.peft_config(model) | dict(lora_dropout=0.0, inference_mode=False)))
    start = {f"base_model.model.{name}": stored.whole().clone() for name, stored in method.tensors(model)}
    if not magnitudes:
        start = {name: tensor for name, tensor in start.items() if "magnitude" not in name}
    set_peft_model_state_dict(twin, start)
    return twin.train()


def twin_loss(twin, batch) -> torch.Tensor:
    """Mean cross entropy over the label tokens of a batch, written down without our code."""
    logits = twin(input_ids=batch["input_ids"]).logits.flatten(0, 1)  # padding is on the right: no mask is needed
    return F.cross_entropy(logits[batch["positions"]], batch["targets"])


def test_peft_layers_attach_in_silence(tiny):
    """qlora puts PEFT's own layers on our packed linears, as PEFT's hook allows; its doubts are no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan(make_config(model_name=tiny(), train_type="qlora"))


def test_gradients(config):
    """Of A, B and the magnitude, at the same point with B off zero: within 1e-4 of the largest entry."""
    run = off_zero(prepared(config))
    model = run.model
    twin = peft_twin(model, run.method, config, magnitudes=True)
    (batch,) = next(batches_of(config, run).first(1))
    step = TrainStep(run, config, task=CAUSAL_LM)
    loss = step.mean_loss(*step.backward([batch]))
    wanted = twin_loss(twin, batch)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in gradients.items():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        ours = model.get_submodule(path).get_parameter(PARTS[f"lora_{part}"]).grad
        assert gradient.abs().max() > 0
        assert (ours - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_loss_curves(config, tmp_path, monkeypatch):
    """Of 120 steps with AdamW in fp32: less than 1e-4 apart everywhere, while the loss falls by much more."""
    loop, begun = train.train, {}

    def begin(run, session):
        twin = peft_twin(run.model, run.method, config, magnitudes=False)  # PEFT's own start of the magnitude
        begun.update(twin=twin, batches=session.batches)
        loop(run, session)

    monkeypatch.setattr(train, "train", begin)
    train.main(config)
    ours, twin, batches = losses(config.output_dir), begun["twin"], begun["batches"]
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.wd)
    wanted = []
    for (batch,) in batches.first(STEPS):
        loss = twin_loss(twin, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert len(ours) == STEPS
    assert wanted[0] - sum(wanted[-10:]) / 10 > 0.3
    assert max(abs(a - b) for a, b in zip(ours, wanted, strict=True)) < 1e-4
