"""What memory goes to, and the one message that ends a run without enough of it."""

from functools import partial

import pytest
import torch
from runs import make_config, prepared

import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import local
from fsdp_utils.memory.budget import OutOfMemory, breakdown, host_activations, remedies
from fsdp_utils.sharding.fsdp import POLICIES


def test_breakdown_counts_what_is_there(tiny):
    """Base, adapters and optimizer are the bytes of the parameters; offloaded ones are not on the GPU."""
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora")
    model, *_ = prepared(config)
    sizes = breakdown(model, config)
    trained = sum(local(p).nbytes for p in model.parameters() if p.requires_grad) / 2**30
    frozen = sum(local(p).nbytes for p in model.parameters() if not p.requires_grad) / 2**30
    assert sizes["base"] == pytest.approx(frozen)
    assert sizes["adapters and gradients"] == pytest.approx(2 * trained)
    assert sizes["optimizer"] == pytest.approx(2 * trained)
    assert list(sizes) == ["base", "adapters and gradients", "optimizer", "activations", "logits"]
    offloaded = breakdown(model, make_config(model_name=tiny("llama"), train_type="bnb_dora", use_cpu_offload=True))
    assert offloaded["base"] == offloaded["optimizer"] == 0


@pytest.mark.parametrize("family", ["phi3", "gemma2", "gptneox", "opt"])
def test_breakdown_of_other_families(tiny, family):
    """Its widest linear tells how much a block keeps inside, whatever the family calls that width."""
    sizes = []
    for train_type in ("custom_lora", "bnb_dora"):
        config = make_config(model_name=tiny(family), train_type=train_type)
        sizes.append(breakdown(prepared(config)[0], config)["activations"])
    llama = make_config(model_name=tiny("llama"), train_type="bnb_dora")
    assert sizes == [breakdown(prepared(llama)[0], llama)["activations"]] * 2  # all are 64 and 128 wide


def test_activations_grow_with_the_policy(tiny):
    """Each policy keeps more than the one before; what is as large as the hidden states can wait in host memory."""
    model, *_ = prepared(make_config(model_name=tiny("llama"), train_type="bnb_dora"))
    of = lambda **flags: breakdown(model, make_config(model_name=tiny("llama"), **flags))["activations"]
    kept = [of(checkpoint_policy=policy) for policy in POLICIES]
    assert kept == sorted(set(kept))
    away = [of(checkpoint_policy=policy, use_activation_cpu_offload=True) for policy in POLICIES]
    assert away[0] == away[1] == away[2] < kept[0] and away[2] < away[3] < kept[3]


def test_host_memory_of_activations(tiny):
    """The input, and under `narrow` five more of its size or less, of all blocks but one."""
    flags = dict(model_name=tiny("llama", num_hidden_layers=5), train_type="bnb_dora", batch_size=2, context_length=96)
    model, *_ = prepared(make_config(**flags))
    state = 2 * 96 * 64 * 4 / 2**30
    assert host_activations(model, make_config(**flags)) == pytest.approx(4 * state)
    assert host_activations(model, make_config(**flags, checkpoint_policy="narrow")) == pytest.approx(4 * 6 * state)


def test_remedies_name_only_what_is_not_in_use():
    """A flag that is already set is not offered."""
    assert "--use_cpu_offload true" in remedies(make_config())
    assert "--use_cpu_offload true" not in remedies(make_config(use_cpu_offload=True))
    assert "--quant_scales double" not in remedies(make_config(train_type="hqq_lora"))
    assert "--checkpoint_policy full" in remedies(make_config(checkpoint_policy="narrow"))
    assert "--checkpoint_policy full" not in remedies(make_config())


def test_out_of_memory_is_one_message(tiny, tiny_data, tmp_path, monkeypatch):
    """torch's error becomes one line: what the memory went to, then the flags that would lower it."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    monkeypatch.setattr(train, "train", full)
    config = make_config(
        model_name=tiny("llama"), dataset=tiny_data, train_type="bnb_dora", output_dir=tmp_path / "out"
    )
    with pytest.raises(OutOfMemory) as error:
        train.main(config)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert (
        message.index("base")
        < message.index("optimizer")
        < message.index("logits")
        < message.index("--quantize_lm_head")
    )


def test_compiler_that_fails_is_one_message(tiny, tiny_data, tmp_path, monkeypatch):
    """What torch's compiler raises of a block becomes one line with the way out."""

    def broken(graph, inputs):
        raise ValueError("no such instruction\nmore")

    monkeypatch.setattr(train, "compiler", lambda config, device: partial(torch.compile, backend=broken))
    flags = dict(model_name=tiny("llama"), dataset=tiny_data, train_type="bnb_dora", output_dir=tmp_path / "out")
    with pytest.raises(UserError) as error:
        train.main(make_config(**flags))
    way_out = "--compile true: the compiler failed (ValueError: no such instruction); pass --compile false"
    assert str(error.value) == way_out
