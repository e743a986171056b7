"""Flags: defaults of the 2024 script, and one clear line for each wrong one."""

import pytest

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import ConfigError, build_parser, flags, parse

# as the 2024 script declared them
DEFAULTS = dict(
    world_size=-1,
    train_type="qlora",
    llama_pro_path=None,
    batch_size=1,
    context_length=512,
    gradient_accumulation_steps=1,
    num_epochs=1,
    dataset="alpaca_sample",
    dataset_samples=512,
    sharding_strategy="full_shard",
    use_gradient_checkpointing=True,
    reentrant_checkpointing=False,
    use_cpu_offload=True,
    use_activation_cpu_offload=False,
    low_memory=True,
    no_sync=False,
    precision="bf16",
    model_name="meta-llama/Llama-2-7b-hf",
    save_model=False,
    output_dir="output",
    lora_rank=64,
    lora_alpha=16,
    lora_dropout=0.1,
    lora_target_modules="all",
    verbose=False,
    lr=1e-5,
    apply_gradient_clipping=False,
    grad_norm=0.3,
    wd=0.1,
    profile_memory=False,
    optimizer="adamw",
    lr_scheduler="constant",
    loading_workers=-1,
    log_to="tqdm",
    master_addr="localhost",
    master_port="12355",
    seed=42,
    project_name="fsdp_qlora",
    name=None,
    group=None,
    entity=None,
    n_bits=4,
    profile=False,
    max_steps=-1,
)
PROFILING = [
    "profiling_output",
    "with_stack",
    "with_shapes",
    "export_trace",
    "export_memory_timeline",
    "wait_steps",
    "warmup_steps",
]
PROFILING += ["active_steps", "repeat", "profiling_frequency"]


def read(*argv):
    return parse(TrainConfig, list(argv), prog="train.py")


def test_old_flags_keep_name_and_default():
    """A command line of the 2024 script means the same here."""
    config = read()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert set(PROFILING) <= {f.name for f in flags(TrainConfig)}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_booleans(text, value):
    """Booleans take true and false, as separate word or after =."""
    assert read("--save_model", text).save_model is value
    assert read(f"--save_model={text}").save_model is value


def test_bare_boolean_is_true():
    """`--packing` alone switches packing on."""
    assert read("--packing", "--batch_size", "2").packing is True


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train_type", "bnb_lora"], ["--train_type bnb_lora", "did you mean bnb_dora"]),
        (["--trian_type", "full"], ["--trian_type", "did you mean --train_type"]),
        (["--lora_rank", "0"], ["--lora_rank 0", "at least 1"]),
        (["--lora_rank", "x"], ["--lora_rank", "x"]),
        (["--lr", "nan"], ["--lr nan", "finite"]),
        (["--lr", "-1"], ["--lr -1.0", "above 0"]),
        (["--save_model", "maybe"], ["--save_model", "maybe", "true or false"]),
        (["--n_bits", "2"], ["--n_bits 2", "hqq"]),
        (["--train_type", "hqq_lora", "--n_bits", "5"], ["--n_bits 5", "8, 4, 3, 2, 1"]),
        (["--train_type", "lora", "--n_bits", "8"], ["--n_bits 8", "does not quantize"]),
        (["--train_type", "hqq_lora", "--quant_scales", "double"], ["--quant_scales double"]),
        (["--train_type", "bnb_llama_pro"], ["--llama_pro_path"]),
        (["--llama_pro_path", "x"], ["--llama_pro_path", "qlora"]),
        (["--use_activation_cpu_offload", "true", "--use_gradient_checkpointing", "false"], ["--use_activation_cpu"]),
        (["--output_dir", ""], ["--output_dir", "name a folder"]),
        (["--seed", "99999999999999999999999"], ["--seed 99999999999999999999999"]),
        (["stray"], ["stray"]),
        (["--lora", "4"], ["--lora", "unknown flag"]),
    ],
)
def test_wrong_flags_are_named(argv, words):
    """One line names the flag, the value and the way out."""
    with pytest.raises(ConfigError) as error:
        read(*argv)
    assert len(str(error.value).splitlines()) == 1
    for word in words:
        assert word in str(error.value)


def test_all_errors_at_once():
    """Two wrong flags give two lines."""
    with pytest.raises(ConfigError) as error:
        read("--lora_rank", "0", "--lr", "inf")
    assert len(str(error.value).splitlines()) == 2


def test_meaningless_flags_say_so():
    """What FSDP2 made meaningless is accepted and said."""
    notes = read("--low_memory", "true", "--loading_workers", "4").notes()
    assert any("--low_memory has no effect" in note for note in notes)
    assert any("--loading_workers has no effect" in note for note in notes)
    assert read().notes() == []
    idle = {
        "n_bits": ["--train_type", "lora", "--n_bits", "4"],
        "checkpoint_policy": ["--use_gradient_checkpointing", "false", "--checkpoint_policy", "products"],
        "grad_norm": ["--grad_norm", "1"],
        "lr_warmup_ratio": ["--lr_scheduler", "constant", "--lr_warmup_ratio", "0.2"],
        "hybrid_shard_size": ["--sharding_strategy", "full_shard", "--hybrid_shard_size", "2"],
    }
    for name, argv in idle.items():
        (note,) = [note for note in read(*argv).notes() if "has no effect" in note]
        assert note.startswith(f"--{name} has no effect: --")
    assert read("--apply_gradient_clipping", "true", "--grad_norm", "1").notes() == []
    offloaded = ("--use_activation_cpu_offload", "true", "--checkpoint_policy", "narrow")
    assert read(*offloaded).notes() == []
    assert "only the inputs of blocks" in read(*offloaded, "--compile", "false").notes()[0]


def test_updates_that_bf16_rounds_away():
    """Weights that train in bf16 at a small rate are said to stand nearly still, unless they are rounded at random."""
    small = ("--optimizer", "adam", "--lr", "1e-5")
    (note,) = read(*small).notes()
    assert note.startswith("--lr 1e-05 with --precision bf16: ") and "; --optimizer adamw rounds" in note
    (other,) = read("--stochastic_rounding", "false").notes()
    assert "; --stochastic_rounding true rounds" in other
    (both,) = read(*small, "--stochastic_rounding", "false").notes()[1:]
    assert "; --optimizer adamw with --stochastic_rounding true rounds" in both
    for name in ("adamw_int8", "muon"):  # which can do nothing else
        (idle,) = read("--optimizer", name, "--stochastic_rounding", "false").notes()
        assert idle.startswith("--stochastic_rounding has no effect: ") and "always rounds at random" in idle
    for argv in ((*small, "--precision", "bf16_autocast"), (*small[:2], "--lr", "1e-3"), small[2:]):
        assert read(*argv).notes() == []


def test_help_explains_every_flag():
    """Every flag has a help text, and the page says defaults."""
    page = build_parser(TrainConfig, prog="train.py").format_help()
    for f in flags(TrainConfig):
        assert f"--{f.name} " in page
        assert len(f.metadata["help"]) > 8
    assert "(default: qlora)" in page


@pytest.mark.parametrize(("flags", "said"), [
    (dict(lora_dropout=0.0, wd=0.1), "which --wd 0.1 shrinks; 0"),
    (dict(lora_dropout=0.1, wd=0.0), "which --lora_dropout 0.1 drops; 0"),
    (dict(lora_dropout=0.1, wd=0.1), "which --lora_dropout 0.1 drops and --wd 0.1 shrinks; 0"),
    (dict(lora_dropout=0.0, wd=0.0), None),
], ids=str)  # fmt: skip
def test_what_touches_an_adapter_that_holds_the_weight(flags, said):
    found = [note for note in TrainConfig(train_type="bnb_dora", lora_init="pissa", **flags).notes() if "pissa" in note]
    assert len(found) == bool(said) and all(said in note for note in found)
