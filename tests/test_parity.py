"""The number of processes, the sharding and the split of the batch do not change what is computed."""

import shutil
from unittest.mock import patch

import pytest
import torch
from closeness import assert_close, assert_close_norm, assert_learns
from real_run import first_step, packed_bytes
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from fsdp_utils.core import ranks
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.folders import new_folder
from fsdp_utils.sharding import offload
from methods import TRAIN_TYPES

# of the table of types and families, llama's column and every third field of the others
FIELDS = [
    (train_type, family)
    for i, train_type in enumerate(TRAIN_TYPES)
    for j, family in enumerate(FAMILIES)
    if family == "llama" or (i + j) % 3 == 0
]


@pytest.mark.parametrize(("train_type", "family"), FIELDS)
def test_two_processes_equal_one(pair, one_process, flags, train_type, family):
    """Every train type, on plain, biased, tied, fused and capped models, with and without CPU offload: loss and
    gradients of 2 processes are those of 1."""
    plain = flags(family, train_type=train_type)
    alone, offloaded = one_process(plain), plain | dict(use_cpu_offload=True)
    assert_learns(alone)
    ways = [plain, offloaded]
    if family == "llama":
        assert_close(first_step(offloaded), alone, relative=1e-5)
    else:  # of the other fields every second is offloaded
        ways = ways[FIELDS.index((train_type, family)) % 2 :][:1]
    for settings in ways:
        for step in pair.run(first_step, {**settings, "batch_size": 4}):
            assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize("train_type", ["full", "custom_qlora", "bnb_dora", "hqq_dora"])
def test_bf16(pair, one_process, flags, train_type):
    """The same in bf16, to its own precision."""
    alone = one_process(flags(train_type=train_type, precision="bf16"))
    both = pair.run(first_step, {**flags(train_type=train_type, precision="bf16"), "batch_size": 4})
    assert_close_norm(both[0], alone, relative=1e-2)


@pytest.mark.parametrize(
    "strategy", ["full_shard", "shard_grad_op", "ddp", "hybrid_full_shard", "hybrid_shard_grad_op"]
)
@pytest.mark.parametrize("hybrid_shard_size", [-1, 1])
def test_strategies(pair, one_process, flags, strategy, hybrid_shard_size):
    """Every sharding strategy gives the gradients of one process."""
    alone = one_process(flags(train_type="bnb_dora"))
    more = dict(sharding_strategy=strategy, hybrid_shard_size=hybrid_shard_size)
    both = pair.run(first_step, {**flags(train_type="bnb_dora", **more), "batch_size": 4})
    assert_close(both[0], alone, relative=1e-5)


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
@pytest.mark.parametrize("no_sync", [False, True])
def test_splits_of_the_global_batch(pair, one_process, flags, train_type, no_sync):
    """1×8, 2×4 and 2×2×(accumulation 2) agree although sample lengths differ widely; so do accumulation 8 and 1×8."""
    alone = one_process(flags(train_type=train_type))
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        more = dict(batch_size=batch, gradient_accumulation_steps=accumulation, no_sync=no_sync)
        assert_close(pair.run(first_step, {**flags(train_type=train_type), **more})[1], alone, relative=1e-5)
    more = dict(batch_size=1, gradient_accumulation_steps=8)
    assert_close(first_step({**flags(train_type=train_type), **more}), alone, relative=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(reentrant_checkpointing=True),
        *(dict(checkpoint_policy=name) for name in ("adapters", "narrow", "products")),
    ],
    ids=str,
)
@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora", "full"])
def test_checkpointing(pair, one_process, flags, train_type, how):
    """Recomputing blocks, re-entrant or in part, changes no gradient."""
    alone = one_process(flags(train_type=train_type, use_gradient_checkpointing=False))
    more = dict(use_gradient_checkpointing=True, **how)
    assert_close(first_step(flags(train_type=train_type, **more)), alone, relative=1e-5)
    both = pair.run(first_step, {**flags(train_type=train_type, **more), "batch_size": 4})
    assert_close(both[0], alone, relative=1e-5)


def first_step_with_whole_embedding(flags):
    """As on GPUs, where each process holds a frozen embedding whole; here in the memory that it has anyway."""
    named = lambda model, config, *, device: offload.embedding_for_host(model, config)
    stay = lambda model, held, *, device: None
    with patch.multiple(offload, whole_embedding=named, move_embedding_to_host=stay):
        return first_step(flags)


@pytest.mark.parametrize("use_cpu_offload", [False, True])
@pytest.mark.parametrize(
    ("train_type", "more"), [("bnb_dora", dict(quantize_lm_head=True)), ("lora", {}), ("full", {})]
)
def test_whole_embedding(pair, one_process, flags, train_type, more, use_cpu_offload):
    """What FSDP2 leaves alone changes nothing; a trained embedding stays with it."""
    alone = one_process(flags(train_type=train_type, **more))
    more = {**more, "batch_size": 4, "use_cpu_offload": use_cpu_offload}
    both = pair.run(first_step_with_whole_embedding, {**flags(train_type=train_type), **more})
    assert_close(both[0], alone, relative=1e-5)


@pytest.mark.parametrize("precision", ["bf16_autocast", "bf16_buffers_autocast", "fp16_autocast"])
@pytest.mark.parametrize("train_type", ["qlora", "bnb_dora", "full"])
def test_autocast(pair, one_process, flags, train_type, precision):
    """Mixed precisions compute what fp32 does, to 16-bit precision, on 1 and 2 processes."""
    reference = one_process(flags(train_type=train_type))
    alone = one_process(flags(train_type=train_type, precision=precision))
    assert alone[0] == pytest.approx(reference[0], rel=1e-2)
    both = pair.run(first_step, {**flags(train_type=train_type, precision=precision), "batch_size": 4})
    assert_close_norm(both[0], alone, relative=1e-2)


@pytest.mark.parametrize(
    "quantizer",
    [
        dict(train_type="bnb_dora"),
        dict(train_type="bnb_dora", quant_type="fp4", quant_scales="bf16"),
        dict(train_type="custom_qlora", quant_scales="double", quant_group_size=32),
        *[dict(train_type="hqq_lora", n_bits=bits) for bits in (8, 4, 3, 2, 1)],
    ],
    ids=str,
)
def test_gathered_bytes_equal_one_process(pair, trio, tiny, quantizer):
    """Codes, scales and zeros of 2 and 3 processes (uneven rows) are those of one, byte for byte."""
    flags = dict(model_name=tiny("llama", intermediate_size=320, vocab_size=301), **quantizer)
    alone = packed_bytes(flags)
    for workers, size in ((pair, 2), (trio, 3)):
        for rank, gathered in enumerate(workers.run(packed_bytes, flags)):
            assert gathered.keys() == alone.keys()
            for name in alone.keys() - {"*shard"}:
                assert torch.equal(gathered[name], alone[name]), (size, rank, name)


def test_base_bytes_per_process(pair, tiny):
    """Each of 2 processes holds half of the frozen base within 1 %."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora")
    total = int(packed_bytes(flags)["*shard"])
    for gathered in pair.run(packed_bytes, flags):
        assert int(gathered["*shard"]) == pytest.approx(total / 2, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_quantized_head(pair, one_process, flags, family):
    """Packed embeddings and heads, tied or not, shard like everything else and stay close to the 16-bit ones."""
    more = dict(train_type="bnb_dora", quantize_lm_head=True)
    alone = one_process(flags(family, **more))
    assert alone[0] == pytest.approx(first_step(flags(family, train_type="bnb_dora"))[0], rel=0.05)
    plain = first_step(flags(family, **more, fused_loss=False, fused_kernels=False))
    assert_close(plain, alone, relative=1e-5)
    both = pair.run(first_step, {**flags(family, **more), "batch_size": 4})
    assert_close(both[0], alone, relative=1e-5)
    tied = family != "llama"
    alone = packed_bytes(flags(family, **more))
    assert ("lm_head.codes" in alone) is not tied


@pytest.mark.parametrize("train_type", ["bnb_dora", "hqq_lora"])
def test_quantized_cache_gives_the_same_bytes(pair, tiny, tmp_path, train_type):
    """A cache written by 2 processes serves 1, and one written by 1 serves 2."""
    flags = dict(model_name=tiny("llama"), train_type=train_type)
    alone = packed_bytes(flags)
    for writers, readers in ((2, 1), (1, 2)):
        cached = {**flags, "quantized_cache": tmp_path / f"{writers}"}
        written = pair.run(packed_bytes, cached)[0] if writers == 2 else packed_bytes(cached)
        again = packed_bytes(cached) if readers == 1 else pair.run(packed_bytes, cached)[1]
        assert len(list((tmp_path / f"{writers}").iterdir())) == 1
        for name in alone.keys() - {"*shard"}:
            assert torch.equal(written[name], alone[name]), name
            assert torch.equal(again[name], alone[name]), name


def own_disk(flags: dict) -> dict[str, torch.Tensor]:
    """`packed_bytes` where every process has a cache folder of its own."""
    return packed_bytes({**flags, "quantized_cache": f"{flags['quantized_cache']}/{ranks.rank()}"})


def test_quantized_cache_that_not_all_processes_see(pair, tiny, tmp_path):
    """On a disk of the first node alone it is written once, then neither read nor waited for."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora")
    alone = packed_bytes(flags)
    for _ in range(2):
        for got in pair.run(own_disk, {**flags, "quantized_cache": tmp_path}):
            assert all(torch.equal(got[name], alone[name]) for name in alone.keys() - {"*shard"})
        assert [len(list((tmp_path / rank).iterdir())) for rank in ("0", "1")] == [1, 0]


def test_quantized_cache_that_another_run_writes(pair, tiny, tmp_path, capfd):
    """Two runs on an empty cache: the second leaves the writing to the first, and both have their weights."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora", quantized_cache=tmp_path / "cache")
    alone = packed_bytes(flags)
    (folder,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(folder)
    with new_folder(folder) as writing:
        (writing / "half").touch()
        for got in (packed_bytes(flags), pair.run(packed_bytes, flags)[0]):
            assert all(torch.equal(got[name], alone[name]) for name in alone.keys() - {"*shard"})
        assert "another process is writing it" in capfd.readouterr().out
        assert [path.name for path in writing.iterdir()] == ["half"] and not folder.exists()


def test_quantized_cache_that_is_a_file(tiny, tmp_path):
    """Refused before a weight is read."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--quantized_cache .*file: "):
        packed_bytes(dict(model_name=tiny("llama"), train_type="bnb_dora", quantized_cache=tmp_path / "file"))


def test_quantized_cache_of_an_edited_checkpoint(tiny, tmp_path):
    """A change between the samples of the fingerprint is seen: the old weights are not taken."""
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    flags = dict(model_name=base, train_type="bnb_dora", quantized_cache=tmp_path / "cache")
    before = packed_bytes(flags)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][1:8:2] *= -1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    after = packed_bytes(flags)
    key = name.replace(".weight", ".base_layer.codes")
    assert not torch.equal(after[key], before[key])
    assert torch.equal(after[key], packed_bytes({**flags, "quantized_cache": tmp_path / "other"})[key])


def test_quantized_cache_is_read(tiny, tmp_path):
    """What the cache holds is what is loaded: a changed byte shows up; another quantizer gets a folder of its own."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora", quantized_cache=tmp_path)
    before = packed_bytes(flags)
    (folder,) = tmp_path.iterdir()
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.codes"
    weights[name] = weights[name] ^ 1
    save_file(weights, folder / "model.safetensors")
    after = packed_bytes(flags)
    key = "model.layers.0.self_attn.q_proj.base_layer.codes"
    assert torch.equal(after[key], before[key] ^ 1)
    packed_bytes({**flags, "quant_group_size": 32})
    assert len(list(tmp_path.iterdir())) == 2
