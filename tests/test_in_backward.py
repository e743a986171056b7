"""--optimizer_in_backward: the bits of the separate step, and no gradient left."""

import gc
import math
import weakref

import pytest
import torch
from real_run import batches_of, make_config, plan, prepared

import train
from fsdp_utils.core.errors import Diverged, UserError
from fsdp_utils.core.rows import gather
from fsdp_utils.memory.budget import remedies, resident
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods.targets import decoder_blocks


def after_steps(flags: dict, *, steps: int = 3) -> tuple[list, dict[str, torch.Tensor]]:
    """Loss and norm of each step, and the gathered parameters after them."""
    config = make_config(**flags)
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    results = [
        step(batches, lr=0.01 / number) for number, batches in enumerate(batches_of(config, run).first(steps), 1)
    ]
    assert all(p.grad is None for p in run.model.parameters())
    step.close()
    numbers = [group.get("steps") for group in step.optimizer.param_groups]
    trained = {name: gather(p.detach()) for name, p in run.model.named_parameters() if p.requires_grad}
    return [(*r[:3], numbers) for r in results], trained


def same_bits(pair, flags: dict, processes: int) -> None:
    """Losses, norms and every trained parameter, in backward and after it."""
    run = after_steps if processes == 1 else lambda flags: pair.run(after_steps, flags)[0]
    (results, parameters), (wanted, reference) = (run(flags | dict(optimizer_in_backward=v)) for v in (True, False))
    assert results == wanted
    assert all(torch.equal(p, reference[name]) for name, p in parameters.items())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        dict(precision="bf16"),  # rounded at random
        dict(precision="fp32"),
        dict(precision="bf16_autocast", optimizer="fused_adamw"),
        dict(optimizer="adam"),
        dict(optimizer="sgd"),
        dict(optimizer="adadelta"),
        dict(optimizer="adamw_8bit"),
        dict(optimizer="adamw_int8", precision="bf16"),
        dict(optimizer="muon", precision="bf16"),
        dict(precision="bf16", use_cpu_offload=True),
        dict(use_gradient_checkpointing=False),
    ],
    ids=str,
)
def test_same_bits(pair, flags, how, processes):
    """For each optimizer, with one process and with sharded rows."""
    same_bits(pair, {**flags(train_type="full"), "batch_size": 2, **how}, processes)


@pytest.mark.parametrize("strategy", ["ddp", "hybrid_full_shard", "shard_grad_op"])
def test_same_bits_of_strategies(pair, flags, strategy):
    """However rows are laid out over the processes."""
    given = dict(batch_size=2, precision="bf16", sharding_strategy=strategy, hybrid_shard_size=1)
    same_bits(pair, flags(train_type="full") | given, 2)


@pytest.mark.parametrize("train_type", ["bnb_dora", "bnb_llama_pro"])
def test_other_train_types(pair, flags, train_type):
    """DoRA's norms are refreshed after the last step."""
    same_bits(pair, flags(train_type=train_type, precision="bf16") | dict(batch_size=2), 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_tied_weight_steps_once(pair, tiny, flags, processes):
    """A weight that is embedding and head waits for both gradients."""
    given = flags("qwen2", train_type="full", precision="bf16") | dict(batch_size=2)
    same_bits(pair, {**given, "model_name": tiny("qwen2", tie_word_embeddings=True)}, processes)


def most_gradients(flags: dict) -> tuple[int, int, int]:
    """The most bytes of gradients that were there at once; those of all, and of the largest parameter."""
    config = make_config(**flags)
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    trained, held = step.trained, []
    count = lambda *_: held.append(sum(p.grad.nbytes for p in trained.sharded if p.grad is not None))
    step.optimizer.register_step_pre_hook(count)
    step(next(batches_of(config, run).first(1)), lr=0.01)
    sizes = [p.nbytes for p in trained.sharded]
    return max(held), sum(sizes), max(sizes)


@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_are_gone(pair, flags, processes):
    """One parameter's gradient at a time, where the separate step holds all."""
    given = flags(train_type="full") | dict(batch_size=2)
    for in_backward in (True, False):
        asked = given | dict(optimizer_in_backward=in_backward)
        held, total, largest = most_gradients(asked) if processes == 1 else pair.run(most_gradients, asked)[0]
        assert held == (largest if in_backward else total)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "fused_adamw", "adamw_8bit", "adamw_int8", "muon", "paged_adamw"])
def test_gpu(tiny, flags, optimizer, compiled):
    """The same bits there too, and the memory of all gradients but one group's is gone."""
    folder, peaks, found = tiny("llama", num_hidden_layers=8, intermediate_size=8192), [], []
    given = flags(train_type="full", precision="bf16", optimizer=optimizer, device="cuda", compile=compiled)
    given |= dict(model_name=folder, attn_implementation="eager", batch_size=2, cuda_graphs=False)
    after_steps(given)  # what the first run in a process allocates for good
    for in_backward in (True, False):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(after_steps(given | dict(optimizer_in_backward=in_backward)))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    (results, parameters), (wanted, reference) = found
    assert results == wanted and all(torch.equal(p, reference[name]) for name, p in parameters.items())
    gradients = sum(p.nbytes for p in parameters.values())
    needs_some_itself = optimizer in ("adamw_int8", "muon")
    assert needs_some_itself or peaks[0] < peaks[1] - gradients / 2


def test_nothing_outlives_the_run(flags):
    """Hooks keep neither the model nor the step."""
    config = make_config(**flags(train_type="full", optimizer_in_backward=True))
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    step(next(batches_of(config, run).first(1)), lr=0.01)
    left = [weakref.ref(thing) for thing in (step, run.model, run.model.get_input_embeddings().weight)]
    del step, run
    gc.collect()
    assert [thing() for thing in left] == [None] * 3


@pytest.mark.parametrize("how", [dict(precision="bf16"), dict(precision="fp32")], ids=str)
def test_loss_that_is_no_number_changes_nothing(flags, how, monkeypatch):
    """Neither with random rounding, where only the device knows, nor with torch's optimizers."""
    config = make_config(**flags(train_type="full", optimizer_in_backward=True, **how))
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    before = [p.detach().clone() for p in run.model.parameters()]
    original = step.micro_step.loss_of
    step.micro_step.loss_of = lambda batch: original(batch) * math.nan
    with pytest.raises(Diverged, match=r"step 1: loss nan.*check the data$"):
        step(next(batches_of(config, run).first(1)), lr=0.01)
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))


def test_gradient_that_is_no_number(flags):
    """Others may have stepped: the message says what is still good."""
    config = make_config(**flags(train_type="full", precision="bf16", optimizer_in_backward=True))
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    first = run.model.get_input_embeddings().weight
    before = first.detach().clone()
    first.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"gradient norm (nan|inf); .*; some parameters .* last checkpoint"):
        step(next(batches_of(config, run).first(1)), lr=0.01)
    assert torch.equal(first, before)  # where it is no number, no step


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(gradient_accumulation_steps=4), "--gradient_accumulation_steps 4"),
        (dict(apply_gradient_clipping=True), "--apply_gradient_clipping true"),
        (dict(precision="fp16_autocast"), "--precision fp16_autocast"),
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused(given, named):
    """One line that names both flags and the way out, before anything is read."""
    with pytest.raises(UserError) as error:
        make_config(train_type="full", optimizer_in_backward=True, **given)
    (line,) = str(error.value).splitlines()
    assert line.startswith("--optimizer_in_backward true: ") and named in line and "; pass " in line


def test_accumulation_that_follows_is_refused(flags, tmp_path):
    """--global_batch_size becomes an accumulation only where the processes are known."""
    given = flags(train_type="full", optimizer_in_backward=True, global_batch_size=4, output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=r"--global_batch_size 4, which makes 2 forward passes") as error:
        train.main(make_config(**given | dict(batch_size=2)))
    assert len(str(error.value).splitlines()) == 1


def test_budget_counts_the_largest_group(tiny):
    """Not less than a block, the embedding or the head; much less than all."""
    held = {}
    for in_backward in (True, False):
        folder = tiny("llama", num_hidden_layers=8)
        config = make_config(model_name=folder, train_type="full", optimizer_in_backward=in_backward)
        model = plan(config).model
        placed = dict(mesh=None, on_host={}, device=torch.device("cpu"))
        held[in_backward] = resident(model, decoder_blocks(model), config, **placed).learned
    nbytes = lambda module: sum(p.nbytes for p in module.parameters())
    largest = max(map(nbytes, [*decoder_blocks(model).values(), model.get_input_embeddings()]))
    assert held[False] == 2 * nbytes(model) and held[True] == nbytes(model) + largest


def test_remedy(tiny):
    """Offered for full fine-tuning where no other flag forbids it."""
    offered = lambda **given: "--optimizer_in_backward true" in remedies(make_config(**given))
    assert offered(train_type="full") and not offered(train_type="bnb_dora")
    assert not offered(train_type="full", optimizer_in_backward=True)
    assert not offered(train_type="full", apply_gradient_clipping=True)
