"""Packed rows: samples do not see each other, whatever attention runs."""

import pytest
import torch
from real_run import first_step, make_config, prepared
from tiny import FAMILIES, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM

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
from fsdp_utils.model import attention, sink_attention
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


LENGTHS = (3, 17, 9)


def with_sinks(*, device="cpu", dtype=torch.float64) -> dict:
    """Queries of 4 heads, keys and values of 2, sinks; each asks for its gradient. Samples of LENGTHS in one row."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()
    tokens, size = sum(LENGTHS), 16
    made = dict(query=new(1, 4, tokens, size), key=new(1, 2, tokens, size), value=new(1, 2, tokens, size))
    return made | dict(sinks=new(4))


def attended(inputs: dict, **settings) -> list[torch.Tensor]:
    """Output of attention over the samples, and the gradients of what it was made of."""
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    out = attention.attend(**inputs, boundaries=starts.to(inputs["query"].device), **settings)
    towards = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, list(inputs.values()), towards)]


def by_hand(query, key, value, *, of_queries, window, scale, total=None):
    """Scores of flattened samples and exp(score - logarithm of their sum): what flash attention is in words."""
    place = torch.arange(len(query))
    sample = torch.searchsorted(of_queries, place.to(of_queries.dtype), right=True)
    distance = place[:, None] - place
    seen = (sample[:, None] == sample) & (distance >= 0) & ((distance <= window) | (window < 0))
    scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~seen, -torch.inf)
    total = scores.logsumexp(-1) if total is None else total
    return (scores - total.unsqueeze(-1)).exp(), total


def forward_by_hand(query, key, value, *, of_queries, of_keys, asked, length, window, scale):
    shares, total = by_hand(query, key, value, of_queries=of_queries, window=window, scale=scale)
    return torch.einsum("hqk,khd->qhd", shares, value), total


def backward_by_hand(grad, query, key, value, out, total, *, of_queries, of_keys, asked, length, window, scale):
    """As flash attention does it: from the output and the logarithms that it is told."""
    shares, _ = by_hand(query, key, value, of_queries=of_queries, window=window, scale=scale, total=total)
    of_shares = torch.einsum("qhd,khd->hqk", grad, value)
    of_scores = shares * (of_shares - (grad * out).sum(-1).T.unsqueeze(-1)) * scale
    return (
        torch.einsum("hqk,khd->qhd", of_scores, key),
        torch.einsum("hqk,qhd->khd", of_scores, query),
        torch.einsum("hqk,qhd->khd", shares, grad),
    )


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_sinks_by_flash_attention(monkeypatch, window, scaling):
    """Output and gradients of heads with sinks, made of attention without them, are those of the definition."""
    monkeypatch.setattr(sink_attention, "forward_by_kernel", forward_by_hand)
    monkeypatch.setattr(sink_attention, "backward_by_kernel", backward_by_hand)
    monkeypatch.setattr(attention, "compute_dtype", lambda tensor: torch.float64)
    inputs, settings = with_sinks(), dict(window=window, scaling=scaling)
    for ours, plain in zip(attended(inputs, **settings), attended(inputs, masked=True, **settings), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


@pytest.fixture
def sinking(tmp_path):
    """The folder of a gpt-oss with a layer that has a window."""
    return make_model(tmp_path, "gpt_oss", layer_types=["sliding_attention", "full_attention"], sliding_window=6)


def test_the_definition_of_sinks(sinking):
    """It is gpt-oss' own attention, in layers with a window and without."""

    def plainly(module, query, key, value, mask, scaling=None, sliding_window=None, s_aux=None, **_):
        known = dict(window=sliding_window, scaling=scaling, sinks=s_aux, masked=True)
        return attention.attend(query, key, value, **known), None

    AttentionInterface.register("plainly", plainly)
    model = AutoModelForCausalLM.from_pretrained(sinking, attn_implementation="eager").eval()
    length = 2 * model.config.sliding_window
    ids = torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(ids).logits
        model.set_attn_implementation("plainly")
        torch.testing.assert_close(model(ids).logits, theirs)


def test_kernels_of_sinks_exist():
    """torch's operators take what the calls hand them, and give tensors of the shapes that are worked with."""
    with FakeTensorMode():
        query, key = (torch.empty(29, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        starts = torch.empty(4, dtype=torch.int32, device="cuda")
        settings = dict(of_queries=starts, of_keys=starts, asked=29, length=29, window=4, scale=0.1)
        out, total = sink_attention.forward_by_kernel(query, key, key, **settings)
        found = sink_attention.backward_by_kernel(out, query, key, key, out, total, **settings)
    assert out.shape == query.shape and total.shape == (4, 29) and total.dtype == torch.float32
    assert [t.shape for t in found] == [query.shape] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_sinks_on_a_gpu(window):
    """The kernels' output and gradients are those of the definition, as far as 16 bits go."""
    inputs = with_sinks(device="cuda", dtype=torch.bfloat16)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    for ours, plain in zip(attended(inputs, window=window), attended(exact, window=window, masked=True), strict=True):
        assert (ours.double() - plain).norm() < 1e-2 * plain.norm()


@pytest.mark.gpu
def test_a_model_with_sinks(sinking):
    """gpt-oss attends by kernels, in rows of several samples too; its loss is that of its own attention."""
    flags = dict(model_name=sinking, train_type="custom_lora", precision="bf16", device="cuda", compile=False)
    assert prepared(make_config(**flags)).model.config._attn_implementation == attention.NAME
    padded = losses_of(make_config(**flags, attn_implementation="eager"), packed=False)
    for packed in (False, True):
        assert losses_of(make_config(**flags, packing=packed), packed=packed) == pytest.approx(padded, rel=1e-2)
