"""The loop: steps, optimizers, clipping, scaling, schedules, packing, what is logged, and what loading costs."""

import copy
import gzip
import json
import math
import threading
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from closeness import assert_close
from real_run import batches_of, first_step, make_config, off_zero, perturb, prepared, tokenized
from tiny import FAMILIES, byte_tokenizer

import train
from fsdp_utils.core import processes
from fsdp_utils.core.errors import Diverged, UserError
from fsdp_utils.core.ranks import rank
from fsdp_utils.core.rows import gather, local
from fsdp_utils.core.safetensors_io import StreamingWriter
from fsdp_utils.data.batches import IGNORED, collate_packed, epoch_rows, with_targets
from fsdp_utils.model.build import read_tokenizer
from fsdp_utils.options import OPTIMIZERS, SCHEDULES
from fsdp_utils.sharding.mesh import shard_group
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training import metrics, sinks
from fsdp_utils.training import step as training_step
from fsdp_utils.training.loss import CausalLMLoss
from fsdp_utils.training.optim import LocalParameters, LossScaler, global_norm, schedule_factor, stock_optimizer
from fsdp_utils.training.step import MicroStep, TrainStep


def run(flags: dict, *, ends=None, **patches) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A whole run in this process: the rows of metrics.jsonl, and the trained parameters before and after.

    `ends` is the context that expects its error, or None; `patches` are of `training.step`, or of its TrainStep.
    """
    config, found, loop = make_config(**flags), {}, train.train

    def snapshot(model):
        return {name: gather(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}

    def observed(prepared, *args, **kwargs):
        found["before"] = snapshot(prepared.model)
        try:
            loop(prepared, *args, **kwargs)
        finally:
            found["after"] = snapshot(prepared.model)

    with ExitStack() as stack:
        stack.enter_context(patch.object(train, "train", observed))
        for name, value in patches.items():
            stack.enter_context(patch.object(training_step if hasattr(training_step, name) else TrainStep, name, value))
        stack.enter_context(ends or nullcontext())
        train.main(config)
    processes.barrier()  # process 0 has written its last line
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], found


def run_compiled(flags: dict, *, here: bool = True) -> list[dict]:
    """A run whose blocks are compiled, without the code generator, in this process or not: its rows."""
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="eager", dynamic=False) if here else None
    with patch.object(train, "compiler", lambda config, device: compiled):
        return run(flags)[0]


def run_compiled_on_one(flags: dict) -> list[dict]:
    """Only process 1 compiles."""
    return run_compiled(flags, here=rank() == 1)


@pytest.fixture
def flags(tiny, tiny_data, tmp_path):
    def make(folder="out", family="llama", **more):
        more = {"lr": 0.01, "batch_size": 4, "train_type": "custom_qlora", **more}
        return dict(model_name=tiny(family), dataset=tiny_data, output_dir=tmp_path / folder, **more)

    return make


def column(rows, name):
    return [row[name] for row in rows]


@pytest.mark.parametrize(("settings", "steps"), [
    (dict(max_steps=3), 3), (dict(max_steps=11), 11), (dict(num_epochs=2), 8), (dict(max_steps=5, num_epochs=9), 5),
])  # fmt: skip
def test_number_of_steps(flags, settings, steps):
    """max_steps runs exactly so many optimizer steps, below and above an epoch of 4; -1 runs the epochs."""
    rows, _ = run(flags(**settings))
    assert column(rows, "step") == list(range(1, steps + 1))


def test_steps_of_packed_epochs(flags, tiny_data):
    """With packing an epoch is over when its packs are: every sample of every epoch is in a step."""
    config = make_config(**flags(packing=True, num_epochs=6, batch_size=1, context_length=80))
    samples = tokenized(config)
    rows = dict(seed=config.seed, context_length=80, packing=True)
    packs = [len(epoch_rows(samples.lengths, epoch=epoch, **rows)[0]) for epoch in range(6)]
    batches = train.make_batches(config, samples, read_tokenizer(config.source), None, task=CAUSAL_LM)
    assert [batches.count(epoch) for epoch in range(6)] == packs
    steps = batches.first(sum(packs))
    labels = sum(len(batch["targets"]) for micro_batches in steps for batch in micro_batches)
    assert labels == 6 * samples.report.label_tokens


def test_metrics(flags):
    """Every row has the fields, and an epoch's tokens are the labels of the data."""
    rows, _ = run(flags(profile_memory=True, log_to="stdout"))
    begun = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "memory_gib", "resident_gib"]
    assert list(rows[0]) == begun
    assert [list(row) for row in rows[1:]] == [[*begun[:6], "seconds_left", *begun[6:]]] * 3
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for row in rows for v in row.values())
    config = make_config(**flags())
    assert sum(column(rows, "tokens")) == tokenized(config).report.label_tokens
    assert 0.05 < rows[0]["resident_gib"] <= rows[0]["memory_gib"] * 1.01


LR = dict(sgd=1.0, adadelta=1.0)


@pytest.mark.parametrize("optimizer", [name for name, row in OPTIMIZERS.items() if not row.needs_cuda])
@pytest.mark.parametrize("train_type", ["custom_qlora", "full"])
def test_optimizers(pair, flags, optimizer, train_type):
    """Three steps on two processes move every parameter to where three steps of one move it."""
    if train_type == "full" and optimizer not in ("adamw", "adamw_8bit", "adamw_int8", "muon"):
        pytest.skip("one sharded matrix is like another to the rest")
    if optimizer == "schedule_free_adamw":
        pytest.importorskip("schedulefree", reason="its steps are the package's")
    more = dict(optimizer=optimizer, train_type=train_type, max_steps=3, lr=LR.get(optimizer, 1e-3), lora_rank=3)
    alone_rows, alone = run(flags("one", **more))
    both_rows, both = pair.run(run, flags("two", **{**more, "batch_size": 2}))[1]
    assert column(both_rows, "loss") == pytest.approx(column(alone_rows, "loss"), rel=1e-5)
    # 8-bit states round in blocks that a shard cuts elsewhere; at random, another last bit may become another code;
    # Muon makes matrices orthogonal in bf16
    relative = {(name, "full"): 1e-3 for name in ("adamw_8bit", "adamw_int8", "muon")}
    relative |= {("adamw_int8", "custom_qlora"): 1e-2}
    relative = relative.get((optimizer, train_type), 1e-5)
    for name, parameter in alone["after"].items():
        assert not torch.equal(parameter, alone["before"][name]), name
        assert (both["after"][name] - parameter).norm() <= relative * parameter.norm().clamp_min(1e-4), name


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_random_rounding_does_not_depend_on_the_sharding(pair, flags, train_type):
    """bf16 weights that two processes share out become what replicas of them become, bit for bit, in every replica."""
    more = dict(precision="bf16", train_type=train_type, max_steps=3, lr=1e-4, lora_rank=3, batch_size=2)
    sharded = pair.run(run, flags("sharded", **more))[0][1]
    replicas = [found for _, found in pair.run(run, flags("replicas", **more, sharding_strategy="ddp"))]
    for name, parameter in sharded["after"].items():
        assert not torch.equal(parameter, sharded["before"][name]), name
        for replica in replicas:
            assert torch.equal(replica["after"][name], parameter), name


def test_fewer_rows_than_processes(pair, flags):
    """With --lora_rank 1 one of two processes holds no row of A; the run is still that of one process."""
    # not Adam: of a gradient near zero, as one row's magnitude has here, it makes a step of the rounding error
    more = dict(train_type="bnb_dora", lora_rank=1, max_steps=3, optimizer="sgd", lr=LR["sgd"])
    alone_rows, alone = run(flags("one", **more))
    both_rows, both = pair.run(run, flags("two", **{**more, "batch_size": 2}))[1]
    assert column(both_rows, "loss") == pytest.approx(column(alone_rows, "loss"), rel=1e-5)
    for name, parameter in alone["after"].items():
        assert (both["after"][name] - parameter).norm() <= 1e-5 * parameter.norm(), name


def test_optimizer_is_torchs(flags):
    """AdamW on the parameters' local rows is torch's own AdamW on the parameters."""
    config = make_config(**flags())
    model = prepared(config).model
    perturb(model)
    trained = LocalParameters(model)
    reference = [p.detach().clone().requires_grad_() for p in trained.plain]
    flags_of_torch = SimpleNamespace(optimizer="adamw", lr=0.01, wd=0.1)
    optimizers = [stock_optimizer(flags_of_torch, trained.plain), torch.optim.AdamW(reference, 0.01, weight_decay=0.1)]
    for _ in range(3):
        for sharded, twin in zip(trained.sharded, reference, strict=True):
            sharded.grad = torch.sin(twin.detach() * 100)
            twin.grad = sharded.grad.clone()
        trained.collect_gradients()
        for optimizer in optimizers:
            optimizer.step()
        trained.zero_grad()
    for sharded, twin in zip(trained.sharded, reference, strict=True):
        assert torch.equal(local(sharded), twin)


def clipped_against_torch(flags: dict) -> tuple[float, float]:
    """Norms of this step's gradients: ours over the processes, torch's over the gathered gradients."""
    config = make_config(**flags)
    ready = off_zero(prepared(config))
    model, mesh, device = ready.model, ready.mesh, ready.device
    step = TrainStep(ready, config, task=CAUSAL_LM)
    step.backward(next(batches_of(config, ready).first(1)))
    whole = [p for p in model.parameters() if p.requires_grad]
    gathered = [torch.nn.Parameter(torch.empty(p.shape)) for p in whole]
    for twin, p in zip(gathered, whole, strict=True):
        twin.grad = gather(p.grad).clone()
    group = shard_group(mesh) if mesh is not None else None
    ours = global_norm(LocalParameters(model).collect_gradients(), group=group, device=device)
    return ours.item(), torch.nn.utils.clip_grad_norm_(gathered, 1.0).item()


@pytest.mark.parametrize("strategy", ["full_shard", "ddp", "hybrid_full_shard"])
def test_gradient_norm_is_global(pair, flags, strategy):
    """Each row counts once, however the gradients are sharded or replicated."""
    settings = flags(train_type="bnb_dora", sharding_strategy=strategy, lora_rank=3)
    for ours, torchs in [clipped_against_torch(settings), *pair.run(clipped_against_torch, settings)]:
        assert ours == pytest.approx(torchs, rel=1e-6)


def test_clipping_in_the_loop(pair, flags):
    """With SGD at rate 1 the step is the clipped gradient: its global norm is --grad_norm, its direction the same."""
    settings = dict(optimizer="sgd", lr=1.0, wd=0.0, max_steps=1, apply_gradient_clipping=True, grad_norm=0.01)
    _, gradients = first_step(flags(), perturbed=False)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    rows, moved = pair.run(run, flags(**{**settings, "batch_size": 2}))[0]
    assert rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)  # logged before it is clipped
    assert norm > 0.01
    for name, gradient in gradients.items():
        step = moved["before"][name] - moved["after"][name]
        torch.testing.assert_close(step, gradient * 0.01 / norm, rtol=1e-3, atol=1e-7)
    _, free = run(flags("free", **{**settings, "grad_norm": 1000.0}))
    for name, gradient in gradients.items():
        torch.testing.assert_close(free["before"][name] - free["after"][name], gradient, rtol=1e-3, atol=1e-6)


class OverflowingScaler(LossScaler):
    """Starts where the first gradients overflow fp16."""

    scales: list

    def __init__(self, enabled):
        super().__init__(enabled, start=2.0**40)
        OverflowingScaler.scales = [self.scale]

    def update(self, finite):
        super().update(finite)
        OverflowingScaler.scales.append(self.scale)


def overflowing_run(flags):
    ends = pytest.raises(Diverged, match="all 2 steps overflowed")  # a run that changed nothing is no success
    rows, found = run(flags, ends=ends, LossScaler=OverflowingScaler)
    return rows, found, OverflowingScaler.scales


def test_fp16_overflow_is_skipped(pair, flags):
    """An overflowing step changes no parameter and halves the scale, alike on every process; its norm is null."""
    settings = flags(precision="fp16_autocast", max_steps=2, train_type="custom_lora")
    for rows, found, scales in [overflowing_run(settings), *pair.run(overflowing_run, settings)]:
        assert scales == [2.0**40, 2.0**39, 2.0**38]
        assert column(rows, "grad_norm") == [None, None]
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert all(torch.equal(found["after"][name], p) for name, p in found["before"].items())


def test_loss_scaler():
    """Doubles after so many good steps in a row, halves after a bad one, never below 1; does nothing when off."""
    scaler = LossScaler(True, start=8.0, growth_interval=2)
    scales = []
    for finite in (True, False, True, True, True, True, False, False, False, False, False, False):
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [8, 4, 4, 8, 8, 16, 8, 4, 2, 1, 1, 1]
    assert not scaler.can_shrink
    off = LossScaler(False)
    off.update(False)
    assert off.scale == 1.0 and not off.can_shrink
    gradients = [torch.tensor([8.0, torch.inf])]
    LossScaler(True, start=4.0).unscale_(gradients)
    assert gradients[0].tolist() == [2.0, torch.inf]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16_autocast"])
def test_divergence_ends_the_run(flags, precision):
    """A loss that is not finite is an error that names the step; in fp16, once the scale cannot be the reason."""
    tired = lambda enabled: LossScaler(enabled, start=2.0)
    nowhere = lambda *args, **kwargs: torch.tensor(torch.nan)
    step = 2 if precision == "fp16_autocast" else 1
    with pytest.raises(Diverged, match=f"step {step}: .*--lr"):  # a UserError: one line, no traceback
        run(flags(precision=precision, train_type="custom_lora"), LossScaler=tired, global_norm=nowhere)


def test_loss_of_fp16_that_is_not_finite(flags):
    """Is never the fault of the scale, which it is not multiplied by."""
    with pytest.raises(Diverged, match="step 1: loss nan"):
        run(flags(precision="fp16_autocast", train_type="custom_lora"), mean_loss=lambda *args: math.nan)


def test_schedules():
    """Warm-up rises to the peak without a zero step; then constant, straight to zero, or a cosine to a tenth."""
    values = {name: [schedule_factor(name, s, total=100, warmup_ratio=0.1) for s in range(100)] for name in SCHEDULES}
    assert values["constant"] == [1.0] * 100
    for name in ("linear", "cosine"):
        assert values[name][:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
        assert values[name][10] == 1.0
        assert all(a > b > 0 for a, b in zip(values[name][10:], values[name][11:], strict=False))
    assert values["linear"][55] == pytest.approx(0.5)
    assert values["linear"][99] == pytest.approx(1 / 90)
    assert values["cosine"][55] == pytest.approx(0.55)
    assert values["cosine"][99] == pytest.approx(0.1, abs=1e-3)
    assert schedule_factor("linear", 0, total=1, warmup_ratio=0.1) == 1.0  # a run of one step trains


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_in_the_loop(pair, flags, schedule):
    """The learning rate logged is the schedule's over all steps, not multiplied by the processes (accelerate#2926)."""
    settings = flags(lr_scheduler=schedule, max_steps=6, lr_warmup_ratio=0.34, batch_size=2)
    rows, _ = pair.run(run, settings)[0]
    want = [0.01 * schedule_factor(schedule, s, total=6, warmup_ratio=0.34) for s in range(6)]
    assert column(rows, "lr") == pytest.approx(want)


def test_another_process_compiles(pair, flags):
    """A step is as slow for all: process 0 marks it too."""
    rows = pair.run(run_compiled_on_one, flags(batch_size=7, max_steps=2))[0]
    assert column(rows, "compiled") == [True, True]  # 7 samples, then none


def test_wandb_without_a_key(monkeypatch):
    """Said before anything is loaded, not asked for in the middle; offline runs need none."""
    import wandb

    def check(*, mode, known):
        monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode)))
        monkeypatch.setattr(wandb, "login", lambda prompt: known)
        metrics.check_sink(make_config(log_to="wandb"))

    check(mode="offline", known=False)
    check(mode="online", known=True)
    with pytest.raises(UserError, match=r"--log_to wandb: no API key .*WANDB_MODE=offline"):
        check(mode="online", known=False)


def test_profiles_need_a_folder(tmp_path):
    """A place for profiles that cannot be one is refused before anything is loaded; one that can is not made yet."""
    (tmp_path / "file").touch()
    config = make_config(profile=True, profiling_output=tmp_path / "file")
    with pytest.raises(UserError, match=f"--profiling_output {tmp_path}/file: "):
        metrics.check_sink(config)
    metrics.check_sink(make_config(profile=True, profiling_output=tmp_path / "out" / "profiles"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_wandb_offline(flags, tmp_path, monkeypatch, offline_wandb):
    """--log_to wandb writes an offline run without a network, with the flags and the same numbers as metrics.jsonl."""
    logged, original = [], sinks.Wandb.log
    monkeypatch.setattr(sinks.Wandb, "log", lambda self, row: (logged.append(row), original(self, row))[1])
    rows, _ = run(flags(log_to="wandb", project_name="trial", name="first", max_steps=2))
    (recorded,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    words, deadline = (b"trial", b"first", b"custom_qlora", b"grad_norm"), time.monotonic() + 60
    while not all(word in recorded.read_bytes() for word in words):  # another process writes it
        assert time.monotonic() < deadline, recorded.read_bytes()
        time.sleep(0.1)
    assert logged == rows


def test_profiler(pair, flags, tmp_path):
    """--profile writes one readable trace per process and cycle, and trains the same."""
    profile = dict(profile=True, profiling_output=tmp_path / "profiles", profiling_frequency=1, active_steps=1)
    rows, _ = pair.run(run, flags("with", **profile, with_shapes=True, max_steps=2, batch_size=2))[0]
    plain, _ = pair.run(run, flags("without", max_steps=2, batch_size=2))[0]
    assert column(rows, "loss") == column(plain, "loss")
    names = sorted(p.name for p in (tmp_path / "profiles").iterdir())
    assert names == [f"rank{rank}_step{step}.json.gz" for rank in (0, 1) for step in (1, 2)]
    for name in names:
        with gzip.open(tmp_path / "profiles" / name) as file:
            assert json.load(file)["traceEvents"]


def test_memory_timeline(flags, tmp_path):
    """--export_memory_timeline writes one also where there is no matplotlib."""
    profile = dict(profile=True, profiling_output=tmp_path / "profiles", profiling_frequency=1, active_steps=1)
    run(flags(**profile, export_memory_timeline=True, export_trace=False, max_steps=1))
    (timeline,) = (tmp_path / "profiles").iterdir()
    assert timeline.name.startswith("rank0_step1_memory.")
    assert timeline.stat().st_size > 1000


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_isolates_samples(flags, family, attention):
    """In a pack every sample has the loss that it has alone."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers offers eager and flex for capped attention")
    config = make_config(**flags(family=family, attn_implementation=attention, packing=True, batch_size=1))
    model = off_zero(prepared(config)).model
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 256, (n,), generator=generator).numpy() for n in (9, 1, 23, 14)]
    loss_of = CausalLMLoss(model, fused=False)
    shape = dict(pad_token_id=0, multiple=1, context_length=64)

    def loss(pack, *, labelled):
        rows = [(ids, ids if i == labelled else ids * 0 + IGNORED) for i, ids in enumerate(pack)]
        with torch.no_grad():
            return loss_of(with_targets(collate_packed([rows], **shape))).item()

    for i, sample in enumerate(samples):
        if len(sample) > 1:
            assert loss(samples, labelled=i) == pytest.approx(loss([sample], labelled=0), rel=1e-5)


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_packed_step_equals_padded_step(flags, train_type):
    """A global batch of all samples gives the same loss and gradients packed and padded."""
    padded = flags(train_type=train_type, batch_size=16, context_length=96)
    config = make_config(**padded)
    data = tokenized(config)
    packs, _ = epoch_rows(data.lengths, seed=config.seed, epoch=0, context_length=96, packing=True)
    assert len(packs) < 16
    packed = first_step({**padded, "packing": True, "batch_size": len(packs)})
    assert_close(packed, first_step(padded), relative=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_loss_in_a_model(pair, flags, family):
    """Loss and gradients without full logits are those with them; where a family caps its logits it falls back."""
    settings = flags(family=family, train_type="full")
    plain = first_step({**settings, "fused_loss": False})
    assert_close(first_step(settings), plain, relative=1e-5)
    both = pair.run(first_step, {**settings, "batch_size": 2})
    assert_close(both[1], plain, relative=1e-5)


def test_fused_loss_keeps_no_graph(flags):
    """The forward is not kept alive by what the head remembers; a family that caps its logits is refused, not trained
    on what became of the loss."""
    model = prepared(make_config(**flags())).model
    loss_of = CausalLMLoss(model, fused=True)
    ids = torch.arange(8).view(1, 8)
    batch = with_targets(dict(input_ids=ids, labels=ids))
    loss_of(batch)
    assert loss_of.head.loss is None and loss_of.head.targets is None
    capped = prepared(make_config(**flags(family="gemma2")))
    assert not capped.fused_loss
    with pytest.raises(RuntimeError, match="changes what its head returns"):
        CausalLMLoss(capped.model, fused=True)(batch)


def trained_rows(prepared_run) -> dict[str, torch.Tensor]:
    return {name: local(p).detach().clone() for name, p in prepared_run.model.named_parameters() if p.requires_grad}


def go_on(flags: dict, *, interrupted: bool) -> tuple[list, dict[str, torch.Tensor]]:
    """Four steps on the same data, and the trained rows after them; or two, and two more by another TrainStep that was
    given the state of the first."""
    config = make_config(**flags)
    ready = off_zero(prepared(config))
    step = TrainStep(ready, config, task=CAUSAL_LM)
    steps = list(batches_of(config, ready).first(4))
    results = [step(micro_batches, lr=0.01) for micro_batches in steps[:2]]
    if interrupted:
        state, rows = copy.deepcopy(step.state_dict()), trained_rows(ready)
        step.close()
        ready = prepared(config)
        for name, p in ready.model.named_parameters():
            if p.requires_grad:
                local(p).data.copy_(rows[name])
        ready.method.after_step(ready.model, device=ready.device)
        step = TrainStep(ready, config, task=CAUSAL_LM)
        step.load_state_dict(state)
    results += [step(micro_batches, lr=0.01) for micro_batches in steps[2:]]
    step.close()
    return results, trained_rows(ready)


@pytest.mark.parametrize(
    "how",
    [
        dict(train_type="bnb_dora", precision="bf16"),  # random rounding draws by the number of the step
        dict(train_type="custom_lora", precision="fp16_autocast"),
        dict(train_type="full", optimizer="adamw_8bit"),
        dict(train_type="custom_qlora", optimizer="sgd"),
    ],
    ids=str,
)
def test_state_of_a_step(pair, flags, how):
    """A TrainStep that takes another one's state goes on as that one would have, bit for bit, on 1 and 2 processes."""
    settings = flags(**how, batch_size=2)
    for run_here in (lambda *args, **kwargs: [go_on(*args, **kwargs)], partial(pair.run, go_on)):
        whole, resumed = run_here(settings, interrupted=False), run_here(settings, interrupted=True)
        for (results, rows), (again, same) in zip(whole, resumed, strict=True):
            assert again == results and all(result.stepped for result in results)
            assert rows.keys() == same.keys() and all(torch.equal(same[name], row) for name, row in rows.items())


def losses_beside(flags: dict) -> tuple[float, float, float]:
    """The loss of a batch by `TrainStep.loss`, that of the step which then learns from it, and `loss` again after."""
    config = make_config(**flags)
    ready = off_zero(prepared(config))
    step = TrainStep(ready, config, task=CAUSAL_LM)
    (micro_batch,) = next(batches_of(config, ready).first(1))
    before = step.loss(micro_batch)
    result = step([micro_batch], lr=0.01)
    assert before.tokens == result.tokens and not any(p.grad is not None for p in ready.model.parameters())
    after = step.loss(micro_batch)
    step.close()
    return before.mean, result.loss, after.mean


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_loss_without_learning(pair, flags, train_type):
    """Looking at a batch tells the loss that the step on it has, changes nothing, and sees what was learned."""
    alone = losses_beside(flags(train_type=train_type))
    both = pair.run(losses_beside, flags(train_type=train_type, batch_size=2))
    for before, learned, after in (alone, *both):
        assert before == pytest.approx(learned, rel=1e-6) and after < before
        assert (before, after) == pytest.approx((alone[0], alone[2]), rel=1e-5)


def test_padding_id_beyond_the_embedding(flags, tiny, tmp_path):
    """A tokenizer whose padding token was added without growing the embedding trains as any other."""
    import shutil

    folder = shutil.copytree(tiny(), tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    tokenizer._tokenizer.add_tokens([f"<{i}>" for i in range(60)])
    tokenizer.add_special_tokens({"pad_token": "<last pad>"})
    tokenizer.save_pretrained(folder)
    assert read_tokenizer(folder).pad_token_id >= 300
    rows, _ = run({**flags("grown", max_steps=2), "model_name": folder})
    plain, _ = run(flags("plain", max_steps=2))
    assert column(rows, "loss") == column(plain, "loss")


WIDE = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=8)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A bf16 checkpoint of about 400 MB, and its bytes."""
    from tiny import SHAPE
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        **{**SHAPE, **WIDE, "num_hidden_layers": 12, "tie_word_embeddings": False, "dtype": "bfloat16"}
    )
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    writer = StreamingWriter(folder, {name: (torch.bfloat16, shape) for name, shape in shapes.items()})
    noise = (torch.randn(4096 * 1024) * 0.02).bfloat16()
    for name, shape in shapes.items():
        writer.write(name, noise[: math.prod(shape)].view(shape))
    writer.finish()
    return folder, 2 * sum(math.prod(shape) for shape in shapes.values())


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def loading_growth(flags: dict) -> tuple[int, int]:
    """Peak growth of this process's anonymous memory while a model is planned and loaded; bytes of its shard."""
    config = make_config(**flags)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = prepared(config).model
    done.set()
    watcher.join()
    return peak[0] - before, sum(local(p).nbytes for p in model.parameters())


@pytest.mark.parametrize("train_type", ["bnb_dora", "custom_lora"])
def test_host_memory_of_loading(pair, wide, train_type):
    """A process grows by its shard and a few tensors, never by the model: the sum is far below the checkpoint."""
    folder, checkpoint_bytes = wide
    assert checkpoint_bytes > 380e6
    flags = dict(model_name=folder, train_type=train_type, precision="bf16", lora_target_modules="q_proj")
    largest = 4096 * 1024 * 4  # bytes of the largest tensor in fp32
    for growth, shard in pair.run(loading_growth, flags):
        assert shard < checkpoint_bytes * (0.52 if train_type == "custom_lora" else 0.16)
        assert growth < shard + 8 * largest


@pytest.mark.parametrize(("compiles", "captured_at"), [((), 1), ((0,), 2), ((0, 1), 3), ((1,), 1)])
def test_no_graph_is_recorded_of_what_has_just_compiled(monkeypatch, compiles, captured_at):
    """What compiled in one batch may in the next, and could not while a graph was recorded. `compiles`: the batches of
    a shape that do; the first capture comes behind one that did not."""
    weight, made, captured = torch.ones(2, requires_grad=True), [], []

    def loss_of(batch):
        made.extend([None] * (len(calls) in compiles))
        return (weight * batch["input_ids"]).sum()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(MicroStep, "_capture", lambda self, key, batch: captured.append(len(calls)))
    run = MicroStep(loss_of, device=torch.device("cpu"), graph_tokens=10, made=lambda: len(made))
    calls = []
    for _ in range(5):
        run(dict(input_ids=torch.ones(1, 2)), 1.0)
        calls.append(None)
    assert captured[0] == captured_at
