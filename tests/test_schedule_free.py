"""--optimizer schedule_free_adamw: the library's steps, the average wherever somebody looks, and exact resuming."""

import importlib.util

import pytest
import torch
from real_run import batches_of, make_config, prepared
from test_checkpoints import same_run

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import local
from fsdp_utils.model.assemble import check_optimizer
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep

installed = pytest.mark.skipif(not importlib.util.find_spec("schedulefree"), reason="needs the package schedulefree")
SCHEDULE_FREE = dict(optimizer="schedule_free_adamw", lr=0.01)


def taken(config, steps: int):
    """A TrainStep after so many steps, and the batches it took."""
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    batches = [batch for (batch,) in step.batches(batches_of(config, run)).first(steps)]
    for batch in batches:
        step([batch], lr=config.lr)
    return step, batches


@installed
@pytest.mark.parametrize("train_type", ["full", "custom_lora"])
def test_steps_are_the_librarys(flags, train_type):
    """By hand: gradient where the library wants it, its step, and the average at the end."""
    from schedulefree import AdamWScheduleFree

    config = make_config(**flags(train_type=train_type, **SCHEDULE_FREE))
    step, batches = taken(config, 4)
    reference = TrainStep(prepared(config), config, task=CAUSAL_LM)
    parameters = reference.trained.sharded
    optimizer = AdamWScheduleFree(parameters, lr=config.lr, weight_decay=config.wd)
    optimizer.train()
    for batch in batches:
        reference.backward([batch])
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    for ours, wanted in zip(step.trained.sharded, parameters, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@installed
def test_between_steps_stands_the_average(flags):
    """What is validated and saved is x, and looking at it changes no bit of it."""
    step, batches = taken(make_config(**flags(train_type="full", **SCHEDULE_FREE)), 3)
    assert not any(group["train_mode"] for group in step.optimizer.param_groups)
    before = [local(p).detach().clone() for p in step.trained.sharded]
    step.loss(batches[0])
    assert all(torch.equal(p, old) for p, old in zip(step.trained.sharded, before, strict=True))


@installed
@pytest.mark.parametrize("options", [
    dict(train_type="bnb_dora", lr_scheduler="constant_with_warmup", use_cpu_offload=True),
    dict(train_type="full", optimizer_in_backward=True),
], ids=str)  # fmt: skip
def test_resumed_is_uninterrupted(pair, flags, tmp_path, options):
    """Bit for bit: a step turns the average into the point of its gradient and back, interrupted or not."""
    same_run(pair, tmp_path, **flags() | dict(batch_size=2, optimizer="schedule_free_adamw") | options)


@pytest.mark.parametrize(
    "given", [dict(precision="bf16"), dict(lr_scheduler="cosine"), dict(lr_scheduler="linear")], ids=str
)
def test_what_it_cannot_do_is_refused(given):
    """bf16 weights, which round averages away, and rates that fall: one line each."""
    with pytest.raises(UserError) as error:
        make_config(train_type="full", **SCHEDULE_FREE | given)
    (line,) = str(error.value).splitlines()
    assert line.startswith("--optimizer schedule_free_adamw: ") and "; use " in line


def test_missing_package(monkeypatch):
    """Is said before anything is read."""
    monkeypatch.setattr("fsdp_utils.model.assemble.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--optimizer schedule_free_adamw: schedulefree is not installed; pip install"):
        check_optimizer(make_config(train_type="full", **SCHEDULE_FREE), device=torch.device("cpu"))
