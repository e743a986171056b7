"""Makes the built-in demo: a small Llama with its own tokenizer, and a dataset of word problems to fine-tune it on.

    python scripts/make_demo.py --output_dir demo --overwrite true

The same seed gives the same dataset, and on the same kind of machine the same weights. Pre-training takes about
12 minutes on 2 cores, 2 on a GPU.
The model is pre-trained on arithmetic statements and little stories that contain them. The dataset asks questions about
one- and two-step stories told in other words, and wants them answered in another format.
"""

import json
import random
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import new_folder
from fsdp_utils.core.ranks import fail

NAMES = [
    "Tom", "Mia", "Sam", "Ana", "Leo", "Eva", "Max", "Zoe", "Ben", "Ida",
    "Kai", "Lia", "Jon", "Amy", "Raj", "Noa", "Ali", "Uma", "Dan", "Joy",
]  # fmt: skip
ITEMS = [
    "apples", "books", "coins", "cards", "pens", "stamps",
    "shells", "marbles", "eggs", "cookies", "stickers", "flowers",
]  # fmt: skip
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
LARGEST = 99
PROMPT = "###Question:\n{question}\n###Answer:\n"

# the operations, folded from left to right over the numbers a, b, c, and the words around them
QUESTIONS = [
    ("+", "{name} picked {a} {item} in the morning and {b} in the afternoon. How many did {name} pick in total?"),
    ("+", "A shop had {a} {item} and ordered {b} extra. How many {item} are in the shop?"),
    ("+", "{name} owns {a} {item}. {other} owns {b} {item}. How many do they own together?"),
    ("-", "{name} owned {a} {item} and sold {b} of them. How many {item} are left?"),
    ("-", "Out of {a} {item}, {b} are broken. How many {item} are fine?"),
    ("-", "{name} needs {a} {item} but has only {b}. How many {item} are missing?"),
    ("*", "Each of {a} boxes holds {b} {item}. How many {item} are there?"),
    ("*", "{name} buys {a} {item} every day for {b} days. How many {item} is that?"),
    ("++", "{name} picked {a} {item}, {other} picked {b} and a friend picked {c}. How many did they pick in total?"),
    ("+-", "{name} owned {a} {item}, bought {b} and sold {c}. How many {item} does {name} own now?"),
    ("+-", "A shop had {a} {item}. It ordered {b} extra and sold {c}. How many {item} are left in the shop?"),
    ("-+", "{name} owned {a} {item}, sold {b} and then bought {c}. How many {item} does {name} own now?"),
    ("-+", "A bag held {a} {item}. {name} took out {b} and put in {c}. How many {item} are in the bag?"),
    ("--", "Out of {a} {item}, {name} sold {b} and {other} sold {c}. How many {item} are left?"),
    ("*+", "{name} buys {a} boxes with {b} {item} each, and {c} single ones. How many {item} is that?"),
    ("*-", "{name} buys {a} boxes of {b} {item}, but {c} are broken. How many {item} are fine?"),
]
# the operations, a story, and how it ends once the result r has been worked out
STORIES = [
    ("+", "{name} had {a} {item} and got {b} more.", "Now {name} has {r} {item}."),
    ("+", "There were {a} {item} in the shop, and {b} extra {item} came in the afternoon.", "That makes {r} {item}."),
    ("+", "{name} found {a} {item} and {other} found {b}.", "Together they own {r} {item}."),
    ("-", "{name} had {a} {item} and gave {b} to {other}.", "Then {name} still had {r} {item}."),
    ("-", "There were {a} {item} on the table. {name} sold {b}.", "It leaves {r} {item}."),
    ("-", "{name} wants {a} {item}. So far there are {b}, the others are missing.", "{name} needs {r} {item}."),
    ("-", "A box held {a} {item}, but {b} of them were broken.", "The other {r} {item} are fine."),
    ("*", "There are {a} bags with {b} {item} in each of them.", "The bags hold {r} {item}."),
    ("*", "For {a} days {name} picked {b} {item} a day.", "In total {name} picked {r} {item}."),
    ("++", "{name} had {a} {item}, got {b} in the morning and {c} the next day.", "So {name} has {r} {item}."),
    ("++", "A friend brought {a} {item}, {name} brought {b} and {other} brought {c}.", "They brought {r} {item}."),
    ("+-", "{name} had {a} {item}, found {b} and lost {c} of them.", "Now {name} has {r} {item}."),
    ("+-", "There were {a} {item} in a bag. {name} put in {b}. {other} took {c}.", "The bag holds {r} {item}."),
    ("-+", "{name} had {a} {item}, gave {b} to {other} and got {c} back.", "So {name} has {r} {item}."),
    ("-+", "There were {a} {item} on the table. {name} took {b}. {other} brought {c}.", "That makes {r} {item}."),
    ("--", "{name} had {a} {item}, lost {b} and gave {c} to a friend.", "Only {r} {item} are left."),
    ("*+", "{name} has {a} bags of {b} {item} and also {c} single {item}.", "{name} owns {r} {item}."),
    ("*-", "There were {a} boxes with {b} {item} in each, and {name} took out {c}.", "It leaves {r} {item}."),
]


@dataclass
class MakeDemo:
    output_dir: str = flag("demo", "folder that is made")
    overwrite: bool = flag(False, "replace what is in --output_dir")
    seed: int = flag(0, "seed of the weights, the pre-training text and the dataset")
    steps: int = flag(4000, "pre-training steps of 16 x 128 tokens", minimum=1)
    train_samples: int = flag(3000, "rows of train.jsonl", minimum=1)
    validation_samples: int = flag(500, "rows of validation.jsonl", minimum=1)

    def errors(self):
        return []


def draw_numbers(ops, rng):
    """Numbers and running results of a chain of operations, every one of them from 1 to LARGEST."""
    while True:
        numbers = [rng.randint(2, 9 if ops[0] == "*" else LARGEST) for _ in range(2)]
        numbers += [rng.randint(2, LARGEST) for _ in ops[1:]]
        results = numbers[:1]
        for op, number in zip(ops, numbers[1:], strict=True):
            results.append(OPERATIONS[op](results[-1], number))
        if all(1 <= result <= LARGEST for result in results):
            return numbers, results


def fill(template, numbers, result, rng):
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "item": rng.choice(ITEMS), "r": result}
    return template.format(**words, **dict(zip("abc", numbers, strict=False)))


def equations(ops, numbers, results):
    steps = zip(results, ops, numbers[1:], results[1:], strict=False)
    return ", ".join(f"{left} {op} {right} = {result}" for left, op, right, result in steps)


def make_problems(count, *, seed=0):
    """`count` rows {"question", "answer"}; no two share both their template and their numbers."""
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < count:
        template = rng.randrange(len(QUESTIONS))
        ops, text = QUESTIONS[template]
        numbers, results = draw_numbers(ops, rng)
        # the 64 products would soon be used up, and the other templates go on
        if (template, *numbers) in seen:
            continue
        seen.add((template, *numbers))
        answer = f"{equations(ops, numbers, results)}. The answer is {results[-1]}."
        rows.append({"question": fill(text, numbers, results[-1], rng), "answer": answer})
    return rows


def pretraining_texts(*, seed=0):
    """An endless stream of short texts: bare statements, and stories with their statement in the middle."""
    rng = random.Random(seed)
    while True:
        ops, story, end = rng.choice(STORIES)
        numbers, results = draw_numbers(ops, rng)
        statement = equations(ops, numbers, results) + "."
        told = fill(f"{story} {statement} {end}", numbers, results[-1], rng)
        yield rng.choice([statement, told])


def make_tokenizer(texts, *, vocab_size=768):
    """Byte-level BPE that never joins digits, so any text has tokens and comes back unchanged."""
    bos, eos, pad = "<|bos|>", "<|eos|>", "<|pad|>"
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[bos, eos, pad], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.06,  # at the usual 0.02 so narrow a model learns to calculate several times slower
    )
    return LlamaForCausalLM(config)


def packed_batches(texts, tokenizer, *, rows=16, length=128):
    """Endless `[rows, length]` token ids; texts follow each other, each between its bos and eos."""
    ids = []
    while True:
        while len(ids) < rows * length:
            for encoded in tokenizer(list(islice(texts, 256))).input_ids:
                ids += [*encoded, tokenizer.eos_token_id]
        yield torch.tensor(ids[: rows * length]).view(rows, length)
        ids = ids[rows * length :]


def pretrain(model, batches, steps, *, lr=2e-3):
    fused = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    progress = trange(steps, desc="pre-training")
    for step in progress:
        input_ids = next(batches).to(model.device)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == steps - 1:
            progress.write(f"step {step}: loss {loss.item():.4f}")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_demo(args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)  # another number of threads sums in another order
    rows = make_problems(args.train_samples + args.validation_samples, seed=args.seed)
    vocabulary = [PROMPT.format(**row) + row["answer"] for row in rows]
    vocabulary += islice(pretraining_texts(seed=args.seed + 1), 5000)
    tokenizer = make_tokenizer(vocabulary)
    model = make_model(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    with new_folder(args.output_dir, overwrite=args.overwrite, mark="model/config.json") as folder:
        pretrain(model, packed_batches(pretraining_texts(seed=args.seed + 2), tokenizer), args.steps)
        model.to(torch.bfloat16).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        settings = folder / "model" / "tokenizer_config.json"  # a class that transformers 4 knows, too
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        write_jsonl(folder / "train.jsonl", rows[: args.train_samples])
        write_jsonl(folder / "validation.jsonl", rows[args.train_samples :])


if __name__ == "__main__":
    try:
        make_demo(parse(MakeDemo, prog="make_demo.py", description=__doc__))
    except UserError as error:
        fail(error)
