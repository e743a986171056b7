"""What only CUDA shows: compiled blocks, kernels in training, offload; on two GPUs, one memory read by another."""

import gc

import pytest
import torch
from closeness import assert_close
from commands import TRAIN, losses, torchrun
from real_run import first_step, make_config, perturb, prepared
from safetensors.torch import load_file

import train
from fsdp_utils.data.batches import with_targets
from fsdp_utils.model.weights import check_loaded
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training import step
from fsdp_utils.training.step import TrainStep
from methods import TRAIN_TYPES

pytestmark = pytest.mark.gpu
ADAPTED = [name for name, row in TRAIN_TYPES.items() if row.method != "llama_pro"]


@pytest.fixture(scope="module")
def flags(tiny, tiny_data):
    def make(**more):
        return dict(model_name=tiny("llama"), dataset=tiny_data, batch_size=8, device="cuda", compile=False, **more)

    return make


@pytest.mark.parametrize("train_type", ADAPTED)
def test_gpu_equals_cpu(flags, train_type):
    """fp32 on the GPU gives the CPU's loss and gradients, for every train type."""
    reference = first_step({**flags(train_type=train_type), "device": "cpu"})
    assert_close(first_step(flags(train_type=train_type)), reference, relative=1e-3)


@pytest.mark.parametrize("train_type", ["custom_qlora", "bnb_dora", "hqq_lora", "hqq_dora", "qlora", "full"])
def test_fast_equals_plain_in_bf16(flags, train_type):
    """Compiled blocks, fused operator and fused loss together give the plain loss and gradients."""
    plain = first_step(flags(train_type=train_type, precision="bf16", fused_kernels=False, fused_loss=False))
    fast = first_step({**flags(train_type=train_type, precision="bf16"), "compile": True})
    assert fast[0] == pytest.approx(plain[0], rel=1e-2)
    for name, gradient in plain[1].items():
        error = (fast[1][name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < 5e-2, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "more",
    [dict(use_activation_cpu_offload=True), dict(use_cpu_offload=True), dict(use_gradient_checkpointing=False),
     dict(reentrant_checkpointing=True), dict(checkpoint_policy="products"),
     dict(use_activation_cpu_offload=True, checkpoint_policy="adapters"),
     dict(use_activation_cpu_offload=True, checkpoint_policy="narrow")],
    ids=str,
)  # fmt: skip
def test_memory_options_change_nothing(flags, more, compiled):
    """Offload and checkpointing give the same loss and gradients, compiled or not."""
    plain = first_step(flags(train_type="bnb_dora"))
    other = first_step({**flags(train_type="bnb_dora", **more), "compile": compiled})
    assert_close(other, plain, relative=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adamw", "adamw_8bit", "sgd"])
@pytest.mark.parametrize("precision", ["bf16", "fp16_autocast"])
def test_whole_run(flags, tmp_path, optimizer, precision):
    """A run on the GPU learns what the same run in fp32 learns on a CPU, and saves what it learned."""
    more = dict(train_type="bnb_dora", optimizer=optimizer, max_steps=6, save_model=True, log_to="stdout", lr=0.01)
    reference = flags(**more) | dict(device="cpu", output_dir=tmp_path / "cpu")
    train.main(make_config(**reference))
    train.main(make_config(**flags(**more), precision=precision, output_dir=tmp_path / "gpu"))
    wanted, got = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert len(got) == 6 and got == pytest.approx(wanted, rel=2e-2)
    assert wanted[0] - wanted[-1] > 10 * max(abs(a - b) for a, b in zip(got, wanted, strict=True)) or optimizer == "sgd"
    saved, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("gpu", "cpu"))
    assert saved.keys() == expected.keys()
    assert all(tensor.isfinite().all() and tensor.any() for tensor in saved.values())


def test_dummy_weights_need_no_files(flags, tiny):
    """Dummy weights fill every parameter."""
    model = prepared(
        make_config(model_name=tiny("llama"), load_format="dummy", train_type="bnb_dora", device="cuda")
    ).model
    check_loaded(model)
    assert all(torch.isfinite(p.float()).all() for p in model.parameters() if p.dtype != torch.float8_e4m3fn)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("train_type", ["custom_qlora", "bnb_dora", "qlora", "full"])
def test_cuda_graphs_change_nothing(flags, train_type, compiled, monkeypatch):
    """Losses and gradients of eight micro-batches in two shapes: replayed, and launched one by one."""
    monkeypatch.setattr(step, "CAPTURE_AFTER", 1)

    def seen(graphs):
        more = flags(train_type=train_type, precision="bf16", cuda_graphs=graphs)
        config = make_config(**more | {"compile": compiled})
        ready = prepared(config)
        model = ready.model
        perturb(model)
        run = TrainStep(ready, config, task=CAUSAL_LM).micro_step
        generator, losses = torch.Generator().manual_seed(0), []
        for length in (64, 128, 64, 128) * 2:
            ids = torch.randint(0, 250, (2, length), generator=generator)
            batch = with_targets(dict(input_ids=ids, labels=ids), multiple=run.targets_multiple)
            losses.append(run(batch, 0.01).item())
        assert len(run.captured) == 2 * graphs
        return losses, [p.grad.float() for p in model.parameters() if p.requires_grad]

    launched, replayed = seen(False), seen(True)
    assert replayed[0] == pytest.approx(launched[0], rel=1e-3)
    for ours, wanted in zip(replayed[1], launched[1], strict=True):
        assert (ours - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("policy", ["full", "narrow", "products"])
def test_offload_of_many_large_states(tiny, policy):
    """Eight blocks whose copies take longer than their computation: none is read, or written over, too early."""

    def gradients(offload):
        flags = dict(model_name=tiny("llama", num_hidden_layers=8), train_type="bnb_dora", device="cuda", compile=True)
        config = make_config(**flags, checkpoint_policy=policy, use_activation_cpu_offload=offload, cuda_graphs=False)
        ready = prepared(config)
        model = ready.model
        perturb(model)
        run = TrainStep(ready, config, task=CAUSAL_LM).micro_step
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            ids = torch.randint(0, 250, (8, 4096), generator=generator)
            run(with_targets(dict(input_ids=ids, labels=ids)), 0.01)
        return [p.grad for p in model.parameters() if p.requires_grad]

    for ours, wanted in zip(gradients(True), gradients(False), strict=True):
        assert (ours - wanted).norm() <= 1e-3 * wanted.norm()


def test_offloaded_activations_leave_the_gpu(tiny):
    """After forward the blocks' inputs are gone from the GPU, but for those whose copy may still be under way."""
    blocks, tokens, hidden = 12, 4096, 64

    def held(offload):
        flags = dict(model_name=tiny("llama", num_hidden_layers=blocks), train_type="custom_qlora", device="cuda")
        config = make_config(**flags, compile=False, use_activation_cpu_offload=offload)
        model = prepared(config).model
        ids = torch.randint(0, 250, (1, tokens), device="cuda")
        before = torch.cuda.memory_allocated()
        output = model(input_ids=ids, use_cache=False).logits
        return torch.cuda.memory_allocated() - before - output.nbytes

    inputs = blocks * tokens * hidden * 4
    assert held(False) - held(True) > 0.7 * inputs


@pytest.mark.parametrize("packed", [False, True])
def test_embedding_on_host_changes_nothing_but_memory(flags, packed):
    """Loss and gradients are those of an embedding on the GPU; its bytes are not there."""

    def seen(on_host):
        more = flags(train_type="bnb_dora", embedding_on_host=on_host, quantize_lm_head=packed)
        gc.collect()  # else what earlier models held is freed meanwhile
        before = torch.cuda.memory_allocated()
        model = prepared(make_config(**more)).model
        held = torch.cuda.memory_allocated() - before
        nbytes = sum(p.nbytes for p in model.get_input_embeddings().parameters())
        del model
        return held, nbytes, first_step(more)

    (there, nbytes, plain), (away, _, other) = seen(False), seen(True)
    assert there - away > 0.9 * nbytes
    assert_close(other, plain, relative=1e-5)


# one GPU has no neighbour; the same gathering through shared host memory is tests/test_peer_gather.py, on CPUs
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("train_type", "rank", "said"),
    [
        ("bnb_dora", 2, "what trains is gathered once a step"),
        ("bnb_dora", 16, "what trains is gathered by block"),
        ("full", 0, "blocks that train are gathered and reduced out of 2 processes' memory"),
    ],
)
def test_two_gpus_read_each_other(tiny, tiny_data, tmp_path, train_type, rank, said):
    """A compiled run on two GPUs that copy out of each other's memory learns what it does through FSDP2's collectives,
    and ends without a word about memory that it shares."""
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=5)  # five blocks for two slots
    flags = dict(model_name=tiny("llama", **shape), dataset=tiny_data, train_type=train_type)
    flags |= dict(lora_dropout=0, lora_rank=rank) if rank else {}
    flags |= dict(use_cpu_offload=False, precision="fp32", batch_size=2, max_steps=4)
    flags |= dict(optimizer="sgd", lr=1e-2, save_model=True)
    found = {}
    for gather in ("auto", "false"):
        folder = tmp_path / gather
        given = flags | dict(peer_gather=gather, output_dir=folder)
        done = torchrun(TRAIN, *(f"--{name}={value}" for name, value in given.items()), scratch=tmp_path, anew=True)
        assert done.returncode == 0, done.stderr
        assert "shared CUDA tensors" not in done.stderr
        assert (said in done.stdout) is (gather == "auto")
        found[gather] = (
            losses(folder),
            load_file(folder / ("adapter_model.safetensors" if rank else "model.safetensors")),
        )
    (our_losses, ours), (their_losses, theirs) = found.values()
    assert len(our_losses) == 4 and our_losses == pytest.approx(their_losses, rel=1e-4)
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-2 * tensor.norm(), name
