"""What memory goes to, and the one message that ends a run without enough of it."""

import gc
from functools import partial

import pytest
import torch
from real_run import make_config, plan, prepared
from tiny import FAMILIES
from torch.autograd.graph import saved_tensors_hooks

import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import local
from fsdp_utils.data.batches import with_targets
from fsdp_utils.memory.activations import measure
from fsdp_utils.memory.budget import OutOfMemory, block_bytes, host_activations, remedies
from fsdp_utils.model import assemble
from fsdp_utils.options import POLICIES
from fsdp_utils.sharding import offload
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.loss import CausalLMLoss
from fsdp_utils.training.step import TrainStep
from methods.targets import decoder_blocks


def test_sizes_count_what_is_there(tiny):
    """Base, adapters and optimizer are the bytes of the parameters, and with accumulation gradients are there all the
    time; offloaded ones are not on the GPU."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora", gradient_accumulation_steps=2)
    run = prepared(make_config(**flags))
    trained = sum(local(p).nbytes for p in run.model.parameters() if p.requires_grad)
    frozen = sum(local(p).nbytes for p in run.model.parameters() if not p.requires_grad)
    assert run.sizes["base"] == frozen
    assert run.sizes["adapters and gradients"] == 2 * trained
    assert run.sizes["optimizer"] == 2 * trained
    assert list(run.sizes) == ["base", "adapters and gradients", "optimizer", "activations", "logits"]
    offloaded = prepared(make_config(**flags, use_cpu_offload=True)).sizes
    assert offloaded["base"] == offloaded["optimizer"] == 0 < offloaded["gathered"]


def kept_by_a_step(run, config) -> int:
    """Bytes that a real forward pass in eager mode saves for backward; parameters do not count."""
    counted = {p.untyped_storage().data_ptr(): 0 for p in run.model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        counted.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    ids = torch.randint(0, 250, (config.batch_size, config.context_length), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        CausalLMLoss(run.model.train(), fused=run.fused_loss)(with_targets(dict(input_ids=ids, labels=ids)))
    return sum(counted.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gptneox", "opt"])
@pytest.mark.parametrize("train_type", ["custom_lora", "bnb_dora"])
def test_activations_are_those_of_a_step(tiny, family, train_type):
    """What is measured on meta is what a real step holds when backward begins, whatever a family calls its widths."""
    shape = dict(num_hidden_layers=6) if family in FAMILIES else {}
    flags = dict(model_name=tiny(family, **shape), train_type=train_type, batch_size=4)
    kept = measured(make_config(**flags))
    for recomputed, of_block in ((False, kept.block), (True, kept.input)):
        config = make_config(**flags, use_gradient_checkpointing=recomputed)
        run = prepared(config)
        loss = 4 * config.context_length * run.model.config.hidden_size * 4  # the gradient of hidden states
        expected = len(run.blocks) * of_block + kept.outside + loss
        assert kept_by_a_step(run, config) == pytest.approx(expected, rel=0.05)


def test_activations_grow_with_the_policy(tiny):
    """Each policy keeps more than the one before; what is as large as the hidden states can wait in host memory."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora")
    of = lambda **more: prepared(make_config(**flags, **more)).sizes["activations"]
    kept = [of(checkpoint_policy=policy) for policy in POLICIES]
    assert kept == sorted(set(kept))
    config, blocks = make_config(**flags, use_activation_cpu_offload=True), 2
    kept_of = {policy: measured(make_config(**flags, checkpoint_policy=policy)) for policy in POLICIES}
    block = lambda found, **how: block_bytes({}, found, config, dtype=torch.float32, **how).recomputing
    away = {policy: block(found, compiled=True) for policy, found in kept_of.items()}
    state, low_rank = 64 * 64 * 4, 6 * 8 * 64 * 4  # a hidden state of 64 tokens; A x of six projections
    assert away["full"] == 0 and away["adapters"] == low_rank + 2 * 32 * 64 * 4  # k and v are narrower than a state
    assert away["narrow"] < away["products"]
    assert all(away[p] < kept_of[p].outputs.by_policy for p in ("adapters", "narrow"))
    # in eager code only the input leaves
    assert block(kept_of["narrow"], compiled=False) == kept_of["narrow"].outputs.by_policy
    assert host_activations(config, kept_of["full"], blocks, compiled=True) == state


def measured(config):
    planned = plan(config)
    return measure(
        planned.model, decoder_blocks(planned.model), config, task=CAUSAL_LM, dtype=torch.float32, autocast=None
    )


@pytest.mark.parametrize("policy", ["full", "narrow"])
def test_host_memory_of_activations(tiny, hostly, monkeypatch, policy):
    """What is said to go to the host is what a compiled step sends there: of all blocks but one."""
    torch._dynamo.reset()
    monkeypatch.setattr(offload, "InputOffloader", lambda **_: hostly)
    monkeypatch.setattr(assemble, "offloads", lambda config, device: True)
    flags = dict(train_type="bnb_dora", batch_size=2, context_length=96, checkpoint_policy=policy)
    base = tiny("llama", num_hidden_layers=5, intermediate_size=192)
    config = make_config(model_name=base, use_activation_cpu_offload=True, **flags)
    compiled = partial(torch.compile, backend="aot_eager_decomp_partition")
    run = assemble.load(plan(config), config, mesh=None, device=torch.device("cpu"), compile_block=compiled)
    ids = torch.randint(0, 250, (2, 96), generator=torch.Generator().manual_seed(0))
    CausalLMLoss(run.model.train(), fused=True)(with_targets(dict(input_ids=ids, labels=ids))).backward()
    assert run.host_activations == sum(copy.nbytes for copy in hostly.sent) > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how", [dict(), dict(use_gradient_checkpointing=False), dict(checkpoint_policy="narrow")], ids=str
)
def test_peak_of_a_step(tiny, how):
    """The parts are about what a step on a GPU takes at its peak, in eager mode: all of them are enough, and without
    the logits, which are gone before backward is in a block, they are not much more."""
    shape = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=4096)
    flags = dict(model_name=tiny("llama", **shape), device="cuda", compile=False, cuda_graphs=False, precision="bf16")
    config = make_config(**flags, train_type="bnb_dora", batch_size=8, context_length=1024, **how)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    ids = torch.randint(0, 4096, (8, 1024), generator=torch.Generator().manual_seed(0))
    batch = with_targets(dict(input_ids=ids, labels=ids))
    step([batch], lr=1e-4)
    torch.cuda.reset_peak_memory_stats()
    step([batch], lr=1e-4)
    peak = torch.cuda.max_memory_allocated() - before
    total = sum(run.sizes.values())
    assert 0.9 * peak <= total and total - run.sizes["logits"] <= 1.5 * peak, (peak, run.sizes)


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


def test_memory_is_planned_for_the_rows_that_are_there(flags):
    """For the longest sample once data has been read, in whole 64s; for all that may come where rows are packed, or
    before that."""
    config = make_config(**flags(context_length=512))
    assert config.row_tokens == 512
    *_, data = train.read_inputs(config)
    assert 64 < max(data.lengths) <= 128 and config.row_tokens == 128
    config.longest_sample = 64
    assert config.row_tokens == 64
    config.longest_sample = 500
    assert config.row_tokens == 512
    packed = make_config(**flags(context_length=512, packing=True))
    train.read_inputs(packed)
    assert packed.row_tokens == 512


def test_shorter_rows_take_less(flags):
    """What a block keeps is in proportion to them."""
    kept = []
    for longest in (0, 64):
        config = make_config(**flags(context_length=512, train_type="custom_lora"))
        config.longest_sample = longest
        model = plan(config).model
        kept.append(measure(model, decoder_blocks(model), config, task=CAUSAL_LM, dtype=torch.float32, autocast=None))
    assert kept[0].input == 8 * kept[1].input
