"""Tests of fsdp_utils.data.batches."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from texts import as_tokenizer, make_config, of_kind, questions, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from fsdp_utils.core.errors import DataError
from fsdp_utils.data.batches import (
    Batches,
    collate,
    collate_packed,
    collate_padded,
    deal,
    epoch_rows,
    pack,
    padding_share,
)
from fsdp_utils.data.tokens import TokenizedData, prepare_dataset


def fake_data(lengths):
    """Rows whose ids tell the sample and the position: 1000 * (sample + 1) + position."""
    ids = [[1000 * (i + 1) + p for p in range(n)] for i, n in enumerate(lengths)]
    labels = [[-100, *row[1:]] for row in ids]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    return TokenizedData(
        dataset=rows, lengths=np.array(lengths, dtype=np.int64), rows=np.arange(len(lengths)), report=None, name="fake"
    )


def samples_of(batch):
    """The samples in a micro-batch, from their ids."""
    return [int(i) // 1000 - 1 for i in batch["input_ids"].flatten() if i >= 1000 and i % 1000 == 0]


def batches_of(data, *, batch_size, gradient_accumulation_steps=1, **changes):
    settings = {"seed": 1, "context_length": 64} | changes
    return Batches(data, collate, batch_size=batch_size, accumulation=gradient_accumulation_steps, **settings)


def all_steps(data, *, world_size, epoch=0, start_step=0, **changes):
    """[rank][step] -> micro-batches."""
    ranks = [batches_of(data, world_size=world_size, rank=rank, **changes) for rank in range(world_size)]
    return [list(batches.steps(epoch, start=start_step)) for batches in ranks]


def labels_of(batch):
    """What each token of a micro-batch is learned as, int64 `[b, L]`; -100 where it is not predicted."""
    labels = torch.full(batch["input_ids"].shape, -100)
    predicting = batch["targets"] != -100
    labels.view(-1)[batch["positions"][predicting] + 1] = batch["targets"][predicting]
    return labels


LENGTHS = np.random.default_rng(0).integers(2, 60, size=44).tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_global_batch_does_not_depend_on_the_split(packing):
    """1x8, 2x4, 4 accumulation steps x 2, 2x2x2 and 8x1: step k holds the same samples, and an epoch each one once."""
    data = fake_data(LENGTHS)
    seen = []
    for batch_size, accumulation, world_size in ((8, 1, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (1, 1, 8)):
        ranks = all_steps(
            data,
            world_size=world_size,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            packing=packing,
        )
        assert len({len(steps) for steps in ranks}) == 1
        assert all(len(step) == accumulation for steps in ranks for step in steps)
        together = [
            sorted(s for step in steps for batch in step for s in samples_of(batch))
            for steps in zip(*ranks, strict=True)
        ]
        seen.append(together)
        split = dict(batch_size=batch_size, gradient_accumulation_steps=accumulation, world_size=world_size)
        assert batches_of(data, packing=packing, **split).count(0) == len(ranks[0])
    assert all(steps == seen[0] for steps in seen)
    assert sorted(s for step in seen[0] for s in step) == list(range(len(LENGTHS)))


def test_last_batch_keeps_every_rank_busy():
    """9 samples in global batches of 8: the last step holds the ninth, and rows without labels elsewhere."""
    ranks = all_steps(fake_data([5] * 9), world_size=2, batch_size=2, gradient_accumulation_steps=2)
    last = [batch for steps in ranks for batch in steps[1]]
    assert len(last) == 4
    assert sum(len(samples_of(batch)) for batch in last) == 1
    for batch in last:
        if not samples_of(batch):
            assert batch["input_ids"].shape == (1, 1)
            assert not len(batch["targets"])


def test_resume_continues_the_epoch():
    """start_step gives the steps that an epoch from its start gives from there on; another epoch differs."""
    data, shape = fake_data(LENGTHS), {"world_size": 1, "batch_size": 2, "gradient_accumulation_steps": 2}
    whole, resumed = all_steps(data, **shape)[0], all_steps(data, start_step=3, **shape)[0]
    assert len(resumed) == len(whole) - 3
    for step, again in zip(whole[3:], resumed, strict=True):
        for batch, same in zip(step, again, strict=True):
            assert all(torch.equal(batch[key], same[key]) for key in batch)
    other = all_steps(data, epoch=1, **shape)[0]
    assert [samples_of(b) for b in other[0]] != [samples_of(b) for b in whole[0]]


def test_ranks_of_a_micro_step_have_similar_lengths():
    """Dealing by length leaves at most 60 % of the padding and waiting that dealing by order leaves."""
    lengths = np.random.default_rng(1).lognormal(5.5, 0.7, size=32).astype(int)

    def waste(shares):
        """Padded tokens over all ranks, each as wide as the longest of its micro-step."""
        return sum(max(lengths[s].max() for s in step) * 4 * 2 for step in zip(*shares, strict=True)) - lengths.sum()

    dealt = [deal(lengths, micro_batches=4, rank=rank, world_size=4) for rank in range(4)]
    naive = [np.array_split(np.arange(32)[rank::4], 4) for rank in range(4)]
    assert sorted(np.concatenate([s for share in dealt for s in share])) == list(range(32))
    assert waste(dealt) < 0.6 * waste(naive)


def test_padded_micro_batch():
    """Rows are padded on the right to a multiple, and padding predicts nothing; types are int64."""
    ranks = all_steps(
        fake_data([3, 5]),
        world_size=1,
        batch_size=2,
        gradient_accumulation_steps=1,
        multiple=4,
    )
    batch = ranks[0][0][0]
    assert set(batch) == {"input_ids", "positions", "targets"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"].shape == (2, 8) and batch["positions"].shape == batch["targets"].shape == (4 + 2,)
    assert batch["input_ids"][1].tolist() == [1000, 1001, 1002, 0, 0, 0, 0, 0]
    assert labels_of(batch)[1].tolist() == [-100, 1001, 1002, -100, -100, -100, -100, -100]


def test_small_dataset_is_refused():
    """Fewer samples than one global batch is an error that names both numbers."""
    shape = dict(batch_size=2, gradient_accumulation_steps=2, world_size=2, context_length=256)
    with pytest.raises(DataError, match=r"fake: 7 samples do not fill one global batch of 8 .*2 processes"):
        batches_of(fake_data([3] * 7), **shape).check()
    batches_of(fake_data([3] * 8), **shape).check()
    with pytest.raises(DataError, match="1 packs of 256 tokens do not fill"):
        batches_of(fake_data([3] * 8), packing=True, **shape).check()


# --- packing


def test_packed_rows_equal_their_samples():
    """Cut where positions restart, a packed row gives the ids and labels of each sample, and padding without labels."""
    data = fake_data(LENGTHS)
    found = []
    for step in all_steps(data, world_size=1, batch_size=2, gradient_accumulation_steps=2, packing=True)[0]:
        for batch in step:
            assert set(batch) == {"input_ids", "position_ids", "cu_seq_lens_q", "positions", "targets"}
            assert batch["input_ids"].shape[1] <= 64
            for ids, labels, positions in zip(batch["input_ids"], labels_of(batch), batch["position_ids"], strict=True):
                starts = [*torch.where(positions == 0)[0].tolist(), len(positions)]
                for start, end in itertools.pairwise(starts):
                    assert positions[start:end].tolist() == list(range(end - start))
                    if ids[start] == 0:
                        assert (labels[start:end] == -100).all()
                        continue
                    sample = int(ids[start]) // 1000 - 1
                    found.append(sample)
                    assert ids[start:end].tolist() == data.dataset[sample]["input_ids"].tolist()
                    assert labels[start:end].tolist() == data.dataset[sample]["labels"].tolist()
    assert sorted(found) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("sigma", [0.5, 0.8])
def test_packs_of_math_problems_are_nearly_full(sigma):
    """Lengths as in Orca-Math (lognormal, median 250) in rows of 2048: under 3 % padding, each sample in one pack."""
    lengths = np.random.default_rng(2).lognormal(np.log(250), sigma, size=30_000).astype(int).clip(8, 2048)
    packs = pack(lengths, capacity=2048, rng=np.random.default_rng(0))
    assert sorted(s for p in packs for s in p) == list(range(len(lengths)))
    assert max(lengths[p].sum() for p in packs) <= 2048
    assert padding_share(packs, lengths, capacity=2048) < 0.03


def test_packed_loss_equals_the_loss_of_single_samples():
    """A tiny Llama gives each token of a packed row the loss it has in a row of its own."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()

    def token_losses(batch):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        return losses[labels[:, 1:].flatten() != -100].double().sum()

    ids = [np.random.default_rng(i).integers(1, 64, size=n) for i, n in enumerate((9, 5, 12, 4, 6))]
    samples = [(row, np.concatenate([[-100] * 2, row[2:]])) for row in ids]
    shape = {"pad_token_id": 0, "multiple": 8, "context_length": 32}
    with torch.no_grad():
        packed = token_losses(collate_packed([samples[:3], samples[3:]], **shape))
        padded = token_losses(collate_padded(samples, **shape))
        alone = sum(token_losses(collate_padded([sample], **shape)) for sample in samples)
    assert torch.allclose(packed, alone, rtol=1e-6)
    assert torch.allclose(padded, alone, rtol=1e-6)


def test_packs_depend_on_seed_and_epoch_only():
    """The same seed and epoch give the same packs; another epoch mixes others together."""
    lengths = np.array(LENGTHS)
    shape = {"context_length": 128, "packing": True}
    first, again = (epoch_rows(lengths, seed=1, epoch=0, **shape)[0] for _ in range(2))
    other = epoch_rows(lengths, seed=1, epoch=1, **shape)[0]
    assert first == again
    assert {frozenset(p) for p in first} != {frozenset(p) for p in other}


def test_pack_refuses_a_sample_longer_than_a_row():
    """A sample that fits no row is an error, not a row that is too long."""
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit a pack of 8"):
        pack(np.array([3, 9]), capacity=8, rng=np.random.default_rng(0))


def test_eos_label_is_kept_where_pad_is_eos(tmp_path, own_cache):
    """With pad = eos the end-of-sequence label stays, and padding has none."""
    tokenizer = as_tokenizer(of_kind("byte_level"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(1), {"question": "q", "answer": "a longer answer " * 3}])
    prepared = prepare_dataset(make_config(path), tokenizer)
    batches = Batches(prepared, collate, batch_size=2, pad_token_id=tokenizer.pad_token_id, context_length=256)
    (batch,) = next(batches.steps(0))
    labels, lengths = labels_of(batch), sorted(prepared.lengths.tolist(), reverse=True)
    for row, end in enumerate(length - 1 for length in lengths):
        assert labels[row, end] == tokenizer.eos_token_id
        assert (labels[row, end + 1 :] == -100).all()
    assert lengths[0] != lengths[1]
