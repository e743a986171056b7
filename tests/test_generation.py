"""Decoding over a cache of fixed size gives the tokens of `generate`, which stays the definition."""

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GenerationConfig

from fsdp_utils.data.encode import TextEncoder
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference import decoding, generation
from fsdp_utils.inference.decoding import StaticDecoder
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.scoring import NEXT_PROMPTS

CPU = torch.device("cpu")
TEXTS = ["a", "How many are 3 and 4?", "###Question:\nlong " * 4, "bcd", "x y z 1 2 3", "hello there", "q" * 30, "zz",
         "1+1=", "Four score"]  # fmt: skip
TOKENIZER = byte_tokenizer()
PROMPTS = list(enumerate(TextEncoder(TOKENIZER).prompts(TEXTS)))
MARKS = generation.Marks(TOKENIZER, NEXT_PROMPTS)
# what a stream that is being captured cannot do: bring a value to the host, or one from there
HOST_OPERATIONS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique")


@pytest.fixture(scope="module")
def opened(tiny):
    """`opened("phi3", **config)`: a tiny model for inference, opened once."""
    made = {}

    def get(family="llama", **config):
        key = (family, *sorted(config.items()))
        if key not in made:
            made[key] = load_for_inference(describe(tiny(family, **config)), device=CPU)
        return made[key]

    return get


def generator_of(model, *, ends=(257,), new=20, temperature=0.0, static=True, **more):
    model.generation_config = GenerationConfig(eos_token_id=list(ends))
    settings = dict(max_new_tokens=new, temperature=temperature, seed=0, static_cache=static, **more)
    return generation.HFGenerator(model, TOKENIZER, **settings)


def answers(generator, *, batch_size=4):
    return {o.index: (o.text, o.tokens) for o in generator.answers(PROMPTS, batch_size=batch_size)}


def both(model, **options):
    """Answers by `generate`, and by steps over the cache of fixed size."""
    stepping = generator_of(model, **options)
    assert stepping.static
    by_steps = answers(stepping)
    return answers(generator_of(model, **options, static=False)), by_steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma", "mistral"])
def test_steps_equal_generate(opened, family, temperature):
    """Ten prompts of different lengths in batches of four, greedy and sampled."""
    expected, found = both(opened(family), temperature=temperature)
    assert found == expected


def test_adapter_steps_equal_generate(save_run, tiny):
    """The same for an unmerged adapter over a quantized base."""
    model = load_for_inference(describe(save_run(tiny(), "bnb_dora")[0]), device=CPU)
    expected, found = both(model)
    assert found == expected


def test_sampling_repeats(opened):
    """Each batch has its own seed: nothing that was sampled before changes an answer."""
    generator = generator_of(opened(), temperature=1.0)
    first = answers(generator)
    torch.rand(3)
    assert answers(generator) == first != answers(generator_of(opened()))


@pytest.mark.parametrize("new", [1, 2, 8, 13])
def test_longest_answer(opened, new):
    """max_new_tokens is reached exactly, be it a multiple of the tokens between two looks or not."""
    expected, found = both(opened("gemma"), new=new, ends=[299])
    assert found == expected
    assert max(tokens for _, tokens in found.values()) == new


def test_rows_end_at_end_tokens(opened):
    """Rows end at any end token, with it counted, while others go on."""
    model = opened("qwen2")
    generator = generator_of(model, ends=[299])
    with torch.inference_mode():
        plain = generator._by_steps(*generator._padded([ids for _, ids in PROMPTS]), seed=0)
    ends = [plain[0][4], plain[3][9]]
    expected, found = both(model, ends=ends)
    assert found == expected
    lengths = {tokens for _, tokens in found.values()}
    assert 20 in lengths and min(lengths) <= 5


def test_rows_end_at_a_next_prompt(opened):
    """Rows end with the mark of a next prompt, as under `generate`; here the mark is what the model happens to say."""
    model = opened()
    text = answers(generator_of(model, ends=[299]))[1][0]
    mark = next(c for i, c in enumerate(text) if i > 4 and c.isascii() and c.isprintable() and c not in text[:i])
    expected, found = both(model, ends=[299], stops=[mark])
    assert found == expected
    assert found[1][0].count(mark) == 1 and found[1][0].endswith(mark)
    assert 20 in {tokens for _, tokens in found.values()}
    assert both(model, ends=[299], stops=()) == both(model, ends=[299])  # chats: no text ends an answer


def test_row_ends_are_those_of_every_token():
    """Looking every few tokens finds the ends that `NextPrompt` and the end tokens have when asked at every token."""
    choose = random.Random(0)
    pieces = ["5\n", "###", "###Question", "### Context:", "#", "Instruction", "###Instruction", "é", "answer "]
    for _ in range(200):
        rows = []
        for _ in range(3):
            ids = TOKENIZER("".join(choose.choices(pieces, k=8)))["input_ids"]
            if choose.random() < 0.5:
                ids[choose.randrange(len(ids))] = 257
            rows.append(ids + [32] * 200)
        length = choose.randint(1, 60)
        rows = [ids[:length] for ids in rows]
        found, every = generation.RowEnds(MARKS, [257], rows=3), choose.randint(1, 9)
        for read in [*range(every, length, every), length]:
            all_ended = found.update([ids[:read] for ids in rows])
        stop = generation.NextPrompt(MARKS, start=0)
        ended = lambda ids, stop=stop: ids[-1] == 257 or stop(torch.tensor([ids]), None).item()
        expected = [next((n for n in range(1, length + 1) if ended(ids[:n])), None) for ids in rows]
        assert found.lengths == expected
        assert all_ended == (None not in expected)


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph: keeps operations with the very tensors they ran on, and repeats only these."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # recording has run it, which capturing does not
            return
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def recordings(monkeypatch):
    """Makes steps be recorded where they would be captured; returns the recordings."""
    made, init = [], StaticDecoder.__init__

    def recording_init(self, *args, graphs, **kwargs):
        init(self, *args, graphs=True, **kwargs)

    def record(self):
        with Recording() as recording:
            self.logits = self._advance()
        self.graph = recording
        made.append(recording)

    monkeypatch.setattr(StaticDecoder, "__init__", recording_init)
    monkeypatch.setattr(StaticDecoder, "_capture", record)
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma", "bnb_dora", "hqq_lora"])
def test_a_step_can_be_replayed(opened, save_run, tiny, recordings, family):
    """A step keeps nothing in Python and brings nothing to the host; each shape of a batch is recorded once."""
    saved = "_" in family
    model = load_for_inference(describe(save_run(tiny(), family)[0]), device=CPU) if saved else opened(family)
    expected, found = both(model)
    assert found == expected
    assert len(recordings) == 2  # of four rows, and of the last two
    assert recordings[0].replays > 20
    names = {str(func) for recording in recordings for func, *_ in recording.calls}
    assert not [name for name in names if any(op in name for op in HOST_OPERATIONS)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fails for want of a GPU")
def test_failed_capture_costs_only_speed(opened, capfd):
    """Where a step cannot be captured, answers are the same, and it is said once."""
    expected = answers(generator_of(opened(), static=False))
    generator = generator_of(opened())
    generator.decoder = StaticDecoder(generator.model, rows=9, length=128, graphs=True)  # the next ones try as it did
    assert answers(generator) == expected
    assert "".join(capfd.readouterr()).count("no CUDA graph of a decoding step") == 1
    assert generator.decoder is None  # its memory is free


def test_out_of_memory_halves_the_batch(opened, monkeypatch, capfd):
    """Whether memory runs out in the prompts or in a step, the batch is halved and the answers are the same."""
    expected = answers(generator_of(opened()))
    for method in ("prefill", "step"):
        run = getattr(StaticDecoder, method)

        def limited(self, *args, run=run):
            if self.rows > 2:
                raise torch.OutOfMemoryError("out of memory")
            return run(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(StaticDecoder, method, limited)
            assert answers(generator_of(opened())) == expected
        assert "going on with 2" in "".join(capfd.readouterr())


def test_cache_is_kept_while_it_fits(opened):
    """Batches of one size share a cache until it would be more than a third too long."""
    decoder = StaticDecoder(opened(), rows=4, length=decoding.cache_length(1000), graphs=False)
    assert decoder.length == 1024
    assert decoder.fits(rows=4, tokens=1024) and decoder.fits(rows=4, tokens=641)
    for rows, tokens in ((3, 1000), (4, 1025), (4, 640)):
        assert not decoder.fits(rows=rows, tokens=tokens), (rows, tokens)


def test_other_models_keep_generate(opened, tiny):
    """Windows, capped logits, rotary embeddings that grow, other attention, and PEFT's wrapper: not by steps."""
    assert decoding.supported(AutoModelForCausalLM.from_pretrained(tiny()))
    rotary = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    other = [
        opened("gemma2"),
        opened("mistral", sliding_window=8),
        AutoModelForCausalLM.from_pretrained(tiny(), rope_parameters=rotary),
        AutoModelForCausalLM.from_pretrained(tiny(), attn_implementation="eager"),
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny()), LoraConfig(target_modules=["q_proj"])),
    ]
    assert [decoding.supported(model) for model in other] == [False] * len(other)
    assert not generator_of(other[1]).static


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------


def assert_same_up_to_ties(model, prompts, found, expected):
    """Rows are the same up to a token that the logits of the model do not tell apart; most rows are the same."""
    same = 0
    for ids, new, reference in zip(prompts, found, expected, strict=True):
        first = next((i for i, pair in enumerate(zip(new, reference, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            assert len(new) == len(reference)
            same += 1
            continue
        logits = model(input_ids=torch.tensor([ids + reference[:first]], device=model.device)).logits[0, -1].float()
        difference = (logits[new[first]] - logits[reference[first]]).abs()
        assert difference <= 2**-6 * logits.abs().max(), (first, new, reference)  # two units in bf16's last place
    assert same >= len(prompts) // 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind, dtype", [("base", "float32"), ("base", "bfloat16"), ("bnb_dora", "bfloat16")])
def test_graphs_equal_generate(tiny, save_run, kind, dtype):
    """Captured steps give the tokens of `generate`: ten prompts in batches of four, and the same batches once more."""
    folder = tiny() if kind == "base" else save_run(tiny(), kind)[0]
    device = torch.device("cuda", torch.cuda.current_device())
    model = load_for_inference(describe(folder), device=device, dtype=getattr(torch, dtype))
    generator = generator_of(model, new=40, static=None)
    assert generator.static
    for prompts in (PROMPTS[:4], PROMPTS[4:8], PROMPTS[8:], PROMPTS[4:8]):
        prompts = [ids for _, ids in prompts]
        with torch.inference_mode():
            padded = generator._padded(prompts)
            found = generator._by_steps(*padded, seed=0)
            assert generator.decoder.graph is not None, "a step was not captured"
            reference = generator._by_generate(*padded, seed=0)
            found, reference = ([generator._until_end(new) for new in rows] for rows in (found, reference))
            assert_same_up_to_ties(model, prompts, found, reference)


@pytest.mark.gpu
def test_sampling_on_the_gpu_equals_generate(tiny):
    """fp32 tells tokens apart, and both draw from the same seed."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = load_for_inference(describe(tiny("qwen2")), device=device, dtype=torch.float32)
    expected, found = both(model, temperature=1.0)
    assert found == expected
