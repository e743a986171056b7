"""--context_parallel: processes that share rows compute what one does that has them whole."""

import json
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from closeness import assert_close, assert_close_norm, assert_learns
from real_run import first_step, make_config, plan
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from workers import Workers

import train
from fsdp_utils.core.errors import Ended, UserError
from fsdp_utils.core.processes import barrier
from fsdp_utils.data.batches import IGNORED, boundaries, collate, predicting_tokens
from fsdp_utils.data.parts import Part, readers
from fsdp_utils.model import attention

ODD = dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1)  # no 2 or 4 processes can share these heads


@pytest.fixture(scope="session")
def quad():
    workers = Workers(4)
    yield workers
    workers.close()


def parts(of: int, folded: bool) -> list[Part]:
    return [Part(index, of, folded) for index in range(of)]


def predicted(batch: dict, columns: torch.Tensor) -> set[tuple[int, int, int]]:
    """Row, column in the whole row, and target of each place that predicts."""
    row, place = batch["positions"] // len(columns), batch["positions"] % len(columns)
    found = zip(row.tolist(), columns[place].tolist(), batch["targets"].tolist(), strict=True)
    return {one for one in found if one[2] != IGNORED}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("of", [2, 3, 4])
@pytest.mark.parametrize("packing", [False, True])
def test_parts_make_the_rows(of, folded, packing):
    """Each token and each target is in one part, at its place in the whole row; also across the edge of a part."""
    generator = torch.Generator().manual_seed(0)
    sample = lambda n: (torch.randint(1, 250, (n,), generator=generator).numpy(),) * 2
    rows = [[sample(30), sample(17)], [sample(48)]] if packing else [sample(48), sample(30)]
    shape = dict(pad_token_id=0, multiple=24, context_length=48, targets_multiple=1)
    whole = collate(rows, packing=packing, **shape)
    every, seen = torch.arange(48), set()
    for part in parts(of, folded):
        mine, columns = part(whole), part.columns(48)
        assert torch.equal(mine["input_ids"], whole["input_ids"][:, columns])
        assert torch.equal(mine["position_ids"], whole.get("position_ids", every.expand(2, -1))[:, columns])
        found = predicted(mine, columns)
        assert found and not found & seen and len(found) == predicting_tokens(mine)
        seen |= found
    assert seen == predicted(whole, every)


def test_parts_of_one_work():
    """Folded, each part attends to about as many tokens; whole pieces would differ by a factor."""
    work = [int((part.columns(4096) + 1).sum()) for part in parts(4, True)]
    assert max(work) == min(work)


def by_hand(query, key, value, *, sample, window, first):
    """Attention token by token, in fp64."""
    shared = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    out = torch.zeros(query.transpose(1, 2).shape, dtype=torch.float64)
    for row in range(len(query)):
        for i in range(query.shape[2]):
            at = first + i
            seen = [j for j in range(at + 1) if sample[row][j] == sample[row][at] and (not window or at - j < window)]
            scores = torch.einsum("hd,hkd->hk", query[row, :, i], key[row][:, seen]) / query.shape[-1] ** 0.5
            out[row, i] = torch.einsum("hk,hkd->hd", scores.softmax(-1), value[row][:, seen])
    return out


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "asked"), [(0, 24), (6, 6), (18, 6), (0, 6)])
def test_attend(window, packed, first, asked):
    """Attention of a piece of each row to all of it, with masks, is that by hand."""
    generator = torch.Generator().manual_seed(0)
    make = lambda heads, length: torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
    query, key, value = make(4, asked), make(2, 24), make(2, 24)
    places = torch.stack([torch.cat([torch.arange(10), torch.arange(14)]), torch.arange(24)])
    sample = [[0] * 10 + [1] * 14, [0] * 24] if packed else [[0] * 24] * 2
    known = dict(boundaries=boundaries(places) if packed else None, window=window, first=first)
    got = attention.attend(query, key, value, masked=True, **known)
    torch.testing.assert_close(got, by_hand(query, key, value, sample=sample, window=window, first=first))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "asked"), [(0, 24), (6, 6), (18, 6), (0, 6)])
def test_attend_by_kernel(window, packed, first, asked):
    """Flash attention gives values and gradients of the masks."""
    torch.manual_seed(0)
    make = lambda heads, length: torch.randn(2, heads, length, 64, device="cuda", requires_grad=True)
    tensors = make(4, asked), make(2, 24), make(2, 24)
    places = torch.stack([torch.cat([torch.arange(10), torch.arange(14)]), torch.arange(24)])
    known = dict(boundaries=boundaries(places).cuda() if packed else None, window=window, first=first)
    plain = attention.attend(*tensors, masked=True, **known)
    fast = attention.attend(*(t.bfloat16() for t in tensors), **known)
    weights = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weights).sum(), tensors)
    got = torch.autograd.grad((fast * weights).sum(), tensors)
    for one, other in zip((fast, *got), (plain, *wanted), strict=True):
        assert (one.float() - other).norm() < 2e-2 * other.norm()


MODELS = {
    "llama": ("llama", {}),
    "odd heads": ("llama", ODD),
    "biases": ("qwen2", {}),
    "fused": ("phi3", {}),
    "window": ("mistral", dict(sliding_window=9)),
    "window, odd heads": ("mistral", dict(sliding_window=9, **ODD)),
    "wide heads": ("gemma", {}),
}


CASES = [(model, "bnb_dora") for model in MODELS]
CASES += [(model, train_type) for model in ("llama", "odd heads") for train_type in ("qlora", "lora", "full")]


@pytest.mark.parametrize(
    ("model", "train_type", "packing"),
    [(*case, packing) for n, case in enumerate(CASES) for packing in ([False, True] if n < 2 else [n % 2 == 0])],
)
def test_two_processes_share_rows(pair, one_process, tiny, flags, model, train_type, packing):
    """Loss and gradients are those of one process."""
    family, shape = MODELS[model]
    given = flags(train_type=train_type, packing=packing) | dict(model_name=tiny(family, **shape), batch_size=4)
    alone = one_process(given)
    assert_learns(alone)
    for step in pair.run(first_step, {**given, "context_parallel": 2}):
        assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize("more", [
    dict(use_cpu_offload=True),
    dict(use_gradient_checkpointing=False),
    dict(reentrant_checkpointing=True),
    dict(checkpoint_policy="narrow"),
    dict(sharding_strategy="ddp"),
    dict(sharding_strategy="hybrid_full_shard", hybrid_shard_size=1),
    dict(fused_loss=False, fused_kernels=False),
    dict(gradient_accumulation_steps=2, batch_size=2, no_sync=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [{}, ODD], ids=["heads", "keys"])
def test_beside_other_flags(pair, one_process, tiny, flags, more, shape):
    given = flags(train_type="bnb_dora") | dict(model_name=tiny("llama", **shape), batch_size=4)
    alone = one_process(given)
    for step in pair.run(first_step, {**given, **more, "context_parallel": 2}):
        assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize(("shape", "packing"), [({}, True), (ODD, False)], ids=["heads, packed", "keys"])
def test_four_processes(quad, one_process, tiny, flags, shape, packing):
    """All of a row, with fewer key heads than processes, or two by two beside data parallelism."""
    given = flags(train_type="bnb_dora", packing=packing) | dict(model_name=tiny("llama", **shape), batch_size=4)
    alone = one_process(given)
    for split in (dict(context_parallel=4), dict(context_parallel=2, batch_size=2)):
        for step in quad.run(first_step, {**given, **split}):
            assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize("shape", [{}, ODD], ids=["heads", "keys"])
def test_bf16(pair, one_process, tiny, flags, shape):
    given = flags(train_type="bnb_dora", precision="bf16") | dict(model_name=tiny("llama", **shape), batch_size=4)
    alone = one_process(given)
    assert_close_norm(pair.run(first_step, {**given, "context_parallel": 2})[0], alone, relative=1e-2)


def run_of(flags: dict) -> None:
    with suppress(Ended):  # by --stop_at_step
        train.main(make_config(**flags))
    barrier()


def test_a_run(pair, tiny, tiny_data, tmp_path):
    """Losses, norms and validation of a run whose first half two processes share and whose second one has whole."""
    given = dict(model_name=tiny("llama"), dataset=tiny_data, train_type="bnb_dora", batch_size=4, max_steps=6, lr=1e-3)
    given |= dict(eval_samples=4, eval_every_steps=3, eval_generate=3, seed=3)
    run_of({**given, "output_dir": tmp_path / "whole"})
    parts = {**given, "output_dir": tmp_path / "parts", "resume": "auto"}
    pair.run(run_of, {**parts, "context_parallel": 2, "stop_at_step": 3})
    run_of(parts)
    whole, shared = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    compared = ("loss", "grad_norm", "tokens", "eval_loss", "eval_tokens", "eval_exact_match")
    number_of = lambda rows: {(row["step"], key): row[key] for row in rows for key in compared if key in row}
    assert len(number_of(whole)) >= 6 * 2
    assert number_of(shared) == pytest.approx(number_of(whole), rel=1e-4)


@pytest.mark.parametrize(("family", "why"), [
    ("gemma2", "caps the scores"),
    ("falcon", "does not leave attention to others"),
])  # fmt: skip
def test_models_that_cannot(tiny, family, why):
    config = make_config(model_name=tiny(family), train_type="lora", context_parallel=2)
    with pytest.raises(UserError, match=f"--context_parallel 2: .*{why}"):
        plan(config)


def run_refused(flags: dict) -> str:
    with pytest.raises(UserError) as found:
        train.main(make_config(**flags))
    return str(found.value)


def run_that_counts_itself(flags: dict) -> str:
    """A family whose tokens are where they are in the row that they come in, whatever `position_ids` say."""
    real = LlamaRotaryEmbedding.forward
    count = lambda module, x, position_ids: real(module, x, torch.arange(x.shape[1]).expand(x.shape[0], -1))
    with patch.object(LlamaRotaryEmbedding, "forward", count):
        return run_refused(flags)


def test_what_counts_positions_itself(pair, tiny, tiny_data, tmp_path):
    """Found out before the first step."""
    flags = dict(model_name=tiny("llama"), dataset=tiny_data, train_type="lora", output_dir=tmp_path / "out")
    for said in pair.run(run_that_counts_itself, {**flags, "context_parallel": 2}):
        assert said == "--context_parallel 2: a row that processes share is another row to llama models; pass 1"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_flags(tiny, tiny_data, tmp_path):
    """What cannot be shared is refused by its flag."""
    given = dict(model_name=tiny("llama"), dataset=tiny_data, train_type="lora", context_parallel=2)
    with pytest.raises(UserError, match="--context_parallel 2: does not divide 1 processes"):
        train.main(make_config(**given, output_dir=tmp_path))
    with pytest.raises(UserError, match=r"--context_length 63: 2 processes .* use 64"):
        make_config(**given, context_length=63)
    with pytest.raises(UserError, match="--context_parallel 2: has attention of its own"):
        plan(make_config(**given, attn_implementation="eager"))
    assert readers(SimpleNamespace(context_parallel=2), 8) == 4
