"""Packed rows: samples do not see each other, whatever attention runs."""

import pytest
import torch
from real_run import first_step, make_config, prepared
from tiny import FAMILIES

import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.data.batches import (
    BOUNDARIES_MULTIPLE,
    boundaries,
    collate_packed,
    collate_padded,
    epoch_rows,
    with_targets,
)
from fsdp_utils.data.tokens import prepare_dataset
from fsdp_utils.model import attention
from fsdp_utils.model.build import read_tokenizer
from fsdp_utils.training.checks import check_packing
from fsdp_utils.training.loss import CausalLMLoss


def samples(count=5):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 17, 9, 1, 20][:count]
    ids = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]
    return [(row, [-100, *row[1:]]) for row in ids]


def losses_of(config, *, packed):
    """The loss sum of the samples, packed in two rows or padded one by one."""
    run = prepared(config)
    model = run.model
    loss, shape = CausalLMLoss(model, fused=run.fused_loss), dict(pad_token_id=0, multiple=1, context_length=64)
    device = next(model.parameters()).device
    rows = samples()
    batches = (
        [collate_packed([rows[:3], rows[3:]], **shape)] if packed else [collate_padded([r], **shape) for r in rows]
    )
    moved = [{k: v.to(device) for k, v in with_targets(b).items()} for b in batches]
    with torch.no_grad():
        return sum(loss(batch).item() for batch in moved)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_equals_padded(tiny, family, implementation):
    """The loss of packed rows is the sum of the losses of their samples."""
    flags = dict(model_name=tiny(family), train_type="bnb_dora", attn_implementation=implementation)
    padded = losses_of(make_config(**flags), packed=False)
    assert losses_of(make_config(**flags, packing=True), packed=True) == pytest.approx(padded, rel=1e-5)


def count_packs(flags, length):
    config = make_config(**flags, context_length=length)
    tokenized = prepare_dataset(config, read_tokenizer(config.source))
    settings = dict(seed=config.seed, epoch=0, context_length=length, packing=True)
    return len(epoch_rows(tokenized.lengths, **settings)[0])


def test_packed_training_equals_padded(pair, tiny, tiny_data):
    """One step over everything: packed on 1 and 2 processes equals padded, in loss and gradients."""
    flags = dict(model_name=tiny("llama"), dataset=tiny_data, train_type="bnb_dora")
    padded = first_step({**flags, "context_length": 200, "batch_size": 16})
    packs = {length: count_packs(flags, length) for length in range(200, 260, 10)}
    length = next(length for length, count in packs.items() if count % 2 == 0)
    flags.update(context_length=length, packing=True)
    packed = first_step({**flags, "batch_size": packs[length]})
    both = pair.run(first_step, {**flags, "batch_size": packs[length] // 2})
    for loss, gradients in (packed, both[0]):
        assert loss == pytest.approx(padded[0], rel=1e-5)
        for name, gradient in padded[1].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def checked(flags: dict) -> None:
    """`check_packing` of a loaded model."""
    run = prepared(make_config(**flags))
    check_packing(run.model, device=run.device, autocast=None)


def test_boundaries():
    """Starts of samples and of padding, then the end, repeated."""
    ends = boundaries(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))
    assert ends[:5].tolist() == [0, 3, 5, 7, 10]
    assert len(ends) == BOUNDARIES_MULTIPLE
    assert set(ends[4:].tolist()) == {10}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_can_be_packed(pair, tiny, family):
    """The check at the start of a packed run finds nothing to say, on one process and two."""
    flags = dict(model_name=tiny(family), train_type="bnb_dora", packing=True)
    checked(flags)
    if family == "llama":
        pair.run(checked, flags)


def test_families_that_cannot_be_packed(tiny, tmp_path, tiny_data):
    """OPT attends to the samples before, whatever position_ids say: the run ends before its first step."""
    flags = dict(model_name=tiny("opt"), dataset=tiny_data, train_type="custom_lora", output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=r"--packing true: .* opt models"):
        train.main(make_config(**flags, packing=True))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=r"--context_length 513: .* 512 positions"):
        train.main(make_config(**flags | {"output_dir": tmp_path / "other"}, context_length=513))


@pytest.mark.gpu
def test_varlen_equals_masks(tiny):
    """Flash attention of variable lengths gives the loss of the masked path in bf16."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora", precision="bf16", device="cuda", compile=False)
    masked = losses_of(make_config(**flags, packing=True, attn_implementation="sdpa"), packed=True)
    config = make_config(**flags, packing=True)
    model = prepared(config).model
    assert model.config._attn_implementation == attention.NAME
    assert losses_of(config, packed=True) == pytest.approx(masked, rel=1e-2)
