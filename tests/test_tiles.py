"""--tile_tokens: feed-forward layers by tiles compute what they do at once, and never hold a whole row's insides."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from closeness import assert_close, assert_close_norm, assert_learns
from real_run import batches_of, first_step, make_config, off_zero, plan, prepared, task_in
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.memory.activations import measure
from fsdp_utils.sharding.tiles import Tiled
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods.targets import decoder_blocks

TILE = 48  # the rows of a batch of 8 have some hundred tokens, and the last tile fewer


TYPES = ("qlora", "bnb_dora", "lora", "full", "bnb_llama_pro")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("family", "train_type"),
    [*(("llama", t) for t in TYPES), *(("gemma2", t) for t in TYPES[::2]), *(("phi3", t) for t in TYPES[1::2])],
)
def test_tiles_equal_the_whole(one_process, flags, family, train_type, packing):
    """Loss and gradients, also where what comes out is normalised (Gemma 2)."""
    given = flags(family, train_type=train_type, packing=packing)
    whole = one_process(given)
    assert_learns(whole)
    assert_close(first_step({**given, "tile_tokens": TILE}), whole, relative=1e-6 if family == "llama" else 1e-5)


@pytest.mark.parametrize("more", [
    dict(use_gradient_checkpointing=False),
    dict(reentrant_checkpointing=True),
    dict(use_cpu_offload=True),
    dict(fused_kernels=False),
    dict(gradient_accumulation_steps=2, batch_size=4),
    dict(lora_dropout=0.3),
    dict(optimizer_in_backward=True),
], ids=str)  # fmt: skip
def test_beside_other_flags(flags, more):
    given, steps = flags(train_type="bnb_dora") | more, []
    for tiles in ({}, dict(tile_tokens=TILE)):
        torch.manual_seed(0)  # of what is dropped
        steps.append(first_step({**given, **tiles}))
    assert_close(steps[1], steps[0], relative=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast", "fp16_autocast"])
def test_sixteen_bits(one_process, flags, precision):
    given = flags(train_type="bnb_dora", precision=precision)
    assert_close_norm(first_step({**given, "tile_tokens": TILE}), one_process(given), relative=1e-2)


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_two_processes(pair, one_process, flags, train_type):
    """Sharded, and with rows that both share."""
    given = flags(train_type=train_type)
    alone = one_process(given)
    for more in (dict(batch_size=4), dict(context_parallel=2)):
        for step in pair.run(first_step, {**given, **more, "tile_tokens": TILE}):
            assert_close(step, alone, relative=1e-5)


class Widest(TorchDispatchMode):
    """The most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora"])
def test_the_insides_never_exist(tiny, tiny_data, train_type):
    """In no moment of a step has anything as many elements as a row is long and the layer wide inside."""
    wide = tiny("llama", intermediate_size=1024)
    given = dict(model_name=wide, dataset=tiny_data, train_type=train_type, batch_size=8, fused_kernels=True)
    found = {}
    for tokens in (0, TILE):
        config = make_config(**given, tile_tokens=tokens)
        run = off_zero(prepared(config))
        step = TrainStep(run, config, task=task_in(config))
        (batches,) = step.batches(batches_of(config, run)).first(1)
        with Widest() as widest:
            step.backward(batches)
        found[tokens] = widest.elements
    insides = batches[0]["input_ids"].numel() * 1024
    assert found[0] >= insides and found[TILE] < insides / 2


@pytest.mark.parametrize(("family", "times"), [("llama", 2), ("gemma2", 3)])
def test_how_often_a_tile_runs(flags, family, times):
    """Forward, and again in backward; a block that recomputes does not run it once more, unless it needs the result."""
    counted = SimpleNamespace(tiles=0)
    real = Tiled.tile

    def tile(self, x, *, first):
        counted.tiles += first == 0 and not isinstance(x, FakeTensor)  # with which memory is measured
        return real(self, x, first=first)

    with patch.object(Tiled, "tile", tile):
        first_step(flags(family, train_type="lora") | dict(tile_tokens=TILE))
    assert counted.tiles == 2 * times  # two blocks


def test_memory_is_planned(tiny):
    """A block keeps hidden states, and nothing of the layer's width."""
    flags = dict(model_name=tiny("llama", intermediate_size=2048), train_type="bnb_dora", batch_size=4)
    kept = {}
    for tokens in (0, TILE):
        planned = plan(make_config(**flags, tile_tokens=tokens))
        how = dict(task=CAUSAL_LM, dtype=torch.float32, autocast=None)
        kept[tokens] = measure(planned.model, decoder_blocks(planned.model), make_config(**flags), **how).block
    assert kept[TILE] < kept[0] - 2 * 4 * 64 * 2048 * 4


def test_what_has_no_tiles(tiny):
    """OPT has no module of its feed-forward layers, and GPT-2 drops by itself; policies keep what tiles never make."""
    given = dict(train_type="lora", tile_tokens=TILE)
    with pytest.raises(UserError, match=r"--tile_tokens 48: opt models drop"):
        plan(make_config(model_name=tiny("opt"), **given))
    with pytest.raises(UserError, match=r"--tile_tokens 48: .*layers.0 of opt models has no feed-forward layer"):
        plan(make_config(model_name=tiny("opt", dropout=0.0), **given))
    with pytest.raises(UserError, match=r"--tile_tokens 48: not with --checkpoint_policy narrow"):
        make_config(model_name=tiny("llama"), **given, checkpoint_policy="narrow")


def test_layers_with_more(tiny, tmp_path):
    """Bloom's layer adds the residual itself, gpt-oss' tells what the router chose too."""
    shape = dict(vocab_size=300, hidden_size=64, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(BloomConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--tile_tokens 48: BloomMLP takes more than hidden states; pass 0"):
        plan(make_config(model_name=tmp_path, train_type="lora", tile_tokens=TILE))
    run = prepared(make_config(model_name=tiny("gpt_oss"), train_type="bnb_dora", tile_tokens=8))
    with pytest.raises(UserError, match="--tile_tokens: GptOssMLP gives more than one tensor; pass 0"):
        run.model(input_ids=torch.zeros(1, 24, dtype=torch.int64))


def test_layers_that_mix_tokens(tiny, tiny_data, tmp_path):
    """Found out before the first step."""
    mixed = lambda module, x: module.down_proj(module.up_proj(x) + module.gate_proj(x.roll(1, dims=1)))
    flags = dict(model_name=tiny("llama"), dataset=tiny_data, train_type="lora", output_dir=tmp_path / "out")
    with patch.object(LlamaMLP, "forward", mixed), pytest.raises(UserError, match="see more than their own token"):
        train.main(make_config(**flags, tile_tokens=TILE))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
