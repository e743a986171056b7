"""--optimizer muon: torch's Muon for the matrices of blocks, AdamW for the rest, on any number of processes."""

import pytest
import torch
from real_run import make_config, prepared

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import gather, local
from fsdp_utils.training.muon import RowsMuon
from fsdp_utils.training.optim import LocalParameters, StochasticAdamW, make_optimizer


def after_steps(flags: dict, *, steps: int = 3) -> dict[str, torch.Tensor]:
    """Gathered parameters after steps of gradients that follow from them."""
    config = make_config(optimizer="muon", lr=0.01, **flags)
    model = prepared(config).model
    trained = LocalParameters(model)
    optimizer = make_optimizer(config, trained)
    for _ in range(steps):
        for p in trained.sharded:
            p.grad = torch.sin(p.detach() * 100)
        trained.collect_gradients()
        optimizer.step()
        trained.zero_grad()
    return {name: gather(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def test_steps_are_torchs(flags):
    """Every parameter is where torch's own classes bring it."""
    given = flags(train_type="full")
    config = make_config(**given, lr=0.01)
    model = prepared(config).model
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in ends]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=config.wd, adjust_lr_fn="match_rms_adamw")
    optimizers = [muon, torch.optim.AdamW(rest, lr=0.01, weight_decay=config.wd)]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.sin(p.detach() * 100)
        for optimizer in optimizers:
            optimizer.step()
    ours = after_steps(given)
    assert len(matrices) > 10 and len(rest) > 3
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
def test_rows_do_not_depend_on_the_sharding(pair, trio, flags, train_type, precision):
    """Two and three processes come to the bits of one: momentum belongs to rows, and is whole where it must be."""
    given = flags(train_type=train_type, precision=precision)
    alone = after_steps(given)
    for several in (pair.run(after_steps, given), trio.run(after_steps, given)):
        for found in several:
            assert all(torch.equal(p, alone[name]) for name, p in found.items())


def test_small_steps_are_not_lost(flags):
    """bf16 weights go as far as fp32 ones at a rate at which rounding to the nearest stands still."""
    p, reference = (
        torch.nn.Parameter(torch.randn(64, 96).sign().mul(0.02).to(t)) for t in (torch.bfloat16, torch.float32)
    )
    reference.data.copy_(p.data)
    start = reference.detach().clone()
    for parameter in (p, reference):
        optimizer = RowsMuon([parameter], whole=[parameter], places=[(3, 0)], lr=1e-5, wd=0.0, seed=1)
        for number in range(50):
            generator = torch.Generator().manual_seed(number % 2)
            parameter.grad = torch.randn(64, 96, generator=generator).to(parameter.dtype)
            optimizer.step()
    moved, wanted = p.detach().float() - start, reference.detach() - start
    assert ((moved * wanted).sum() / wanted.square().sum()).item() == pytest.approx(1, abs=0.1)


def test_who_trains_what(flags):
    """Matrices of blocks by Muon; embedding, head and norms by AdamW, rounded at random where weights are bf16."""
    config = make_config(optimizer="muon", **flags(train_type="full", precision="bf16"))
    model = prepared(config).model
    muon, rest = make_optimizer(config, LocalParameters(model)).optimizers
    assert isinstance(rest, StochasticAdamW)
    count = lambda optimizer: sum(p.numel() for p in optimizer.param_groups[0]["params"])
    in_blocks = sum(local(p).numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    assert count(muon) == in_blocks and count(muon) + count(rest) == sum(p.numel() for p in model.parameters())


def refused(flags: dict) -> str:
    with pytest.raises(UserError) as error:
        after_steps(flags)
    return str(error.value)


def test_too_few_rows(trio, flags):
    """A process without rows would not come to where they are gathered: all say so."""
    for line in trio.run(refused, flags(train_type="custom_lora", lora_rank=2)):
        assert line.startswith("--optimizer muon: ") and "has 2 rows, too few for 3 processes; use adamw" in line
