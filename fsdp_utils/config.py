"""Every flag of train.py, declared once: name, default, help and check side by side."""

from argparse import ArgumentTypeError
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches

from fsdp_utils.core.errors import ConfigError
from fsdp_utils.core.flags import boolean, flag, section
from fsdp_utils.core.folders import repository_errors
from fsdp_utils.options import OPTIMIZERS, POLICIES, PRECISIONS, SCHEDULES, SINKS, STRATEGIES, TASKS
from methods import CORRECTING, GROUP_SIZES, METHODS, QUANTIZERS, ROUNDINGS, SCALINGS, STARTS, TRAIN_TYPES, bits

# Adam moves a weight by about the rate, and a bf16 number of 0.02 by 6e-5 or not at all: at 1e-5, weights of that size
# went 8 % as far as in fp32, at 1e-4 65 %, at 1e-3 99 %
ROUNDED_AWAY_LR = 1e-4

_ROUNDING = [name for name, row in OPTIMIZERS.items() if row.rounds]

PROFILING = ("profiling_output", "export_trace", "export_memory_timeline", "with_stack", "with_shapes", "wait_steps",
             "warmup_steps", "active_steps", "repeat", "profiling_frequency")  # fmt: skip


@dataclass
class TrainConfig:
    """The settings of one run; see `python train.py --help`."""

    _files: str = section("flags from a file", may_change=True)
    config: str | None = flag(
        None, "YAML file of flags, as those in recipes/, or the run.json of a run; the command line wins",
        belongs="command",
    )  # fmt: skip
    save_config: str | None = flag(None, "write a file by which --config makes this run, and go on", belongs="command")

    _method: str = section("what is trained")
    train_type: str = flag("qlora", "how the model is adapted, and on which base", choices=tuple(TRAIN_TYPES))
    task: str = flag(
        "auto",
        "what the model is for; auto: by its architecture and the columns of the data",
        choices=("auto", *TASKS),
        may_change=True,  # found anew from what may not
    )
    model_name: str = flag(
        "meta-llama/Llama-2-7b-hf", "hub name or local folder; `demo` is the built-in model", may_change=True
    )
    trust_remote_code: bool = flag(
        False, "run the code that the model's folder brings (auto_map in its documents)", may_change=True
    )
    llama_pro_path: str | None = flag(None, "folder of a block-expanded model (*_llama_pro)", may_change=True)
    lora_rank: int = flag(64, "rank r of the adapters", minimum=1, maximum=2**16)
    lora_alpha: int = flag(16, "adapters are scaled by alpha / r", above=0)
    lora_dropout: float = flag(0.1, "dropout before the adapters", minimum=0.0, maximum=0.99)
    lora_target_modules: str = flag(
        "all",
        "`all` (q,k,v,gate,up,down or their like), `all_linear`, `default` (PEFT's choice), or names: q_proj,v_proj; "
        "with `experts` beside it those of a mixture too: all,experts",
        several=True,
    )
    lora_init: str = flag(
        "default",
        "how adapters begin. default: A at random, B at zero; pissa: as the principal part of the weight, which leaves "
        "the base; pissa_niter_16: the same by fast subspace iteration; qera: as what makes up best for the rounding "
        "of a quantized base, on samples of the data",
        choices=tuple(STARTS),
    )
    init_samples: int = flag(128, "with --lora_init qera: samples by which the rounding is corrected", minimum=1)
    train_for: str = flag(
        "none",
        "the export on whose rounding the adapter learns, so that it keeps what was learned: nf4 for --infer_type "
        "bnb_nf4, w4a16 for w4a16; see docs/exports.md",
        choices=tuple(ROUNDINGS),
    )
    round_every: int = flag(10, "with --train_for: steps after which the base is rounded anew", minimum=1)
    use_rslora: bool = flag(False, "scale adapters by alpha / sqrt(r) instead of alpha / r", choices=tuple(SCALINGS))
    train_router: bool = flag(False, "train the routers of a mixture of experts too, whole")
    n_bits: int | str = flag(
        4,
        "bits of the quantized base: 4 for bnb; 8, 4, 3, 2 or 1 for hqq; mixed: a fifth of the blocks, those at both "
        "ends, at 4, the others at 2 (a plan by measure: scripts/plan_bits.py)",
    )
    quant_type: str = flag("nf4", "4-bit code of bitsandbytes", choices=("nf4", "fp4"))
    quant_group_size: int = flag(64, "weights that share one scale", choices=GROUP_SIZES)
    quant_scales: str = flag(
        "auto",
        "how scales are stored: bf16 (half the bytes, lossless for bf16 weights), fp32, double (8-bit scales), "
        "or auto: bf16 where lossless",
        choices=("auto", "bf16", "fp32", "double"),
    )
    quantize_lm_head: bool = flag(False, "quantize embedding and head too: less memory, a little less exact")
    bits_plan: str | None = flag(
        None, "JSON file of patterns of module paths and the bits of what they match (docs/memory.md); or its content"
    )

    _data: str = section("data")
    dataset: str = flag(
        "alpaca_sample",
        "name (see docs/data.md), local file, glob or folder, set of the hub (org/name), or several with weights: "
        "a.jsonl:0.7,org/b:0.3",
        may_change=True,  # the content may not
        several=True,
    )
    dataset_split: str = flag("train", "split of a hub set or folder that has several", may_change=True)
    dataset_config: str | None = flag(None, "configuration of a hub set that has several", may_change=True)
    columns: str | None = flag(
        None,
        "what columns are called in the data: question=prompt,answer=choices.0.text",
        may_change=True,
        several=True,
    )
    prompt_template: str | None = flag(
        None, "file with the prompt of question and answer rows, columns in braces: {question}", may_change=True
    )
    chat_template: str | None = flag(
        None, "file with a Jinja chat template in place of the tokenizer's; saved with the result", may_change=True
    )
    train_on: str = flag("all", "which of the assistant's turns are learned", choices=("all", "last"))
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be read, and count them; false: end at the first")
    plan: bool = flag(
        False, "print what a run would take, from config.json alone, and end", may_change=True, belongs="command"
    )
    plan_gpus: str | None = flag(
        None, "with --plan true: for these cards, as 2x24 (GiB) or 4xH100, not those that are here",
        may_change=True, belongs="command",
    )  # fmt: skip
    show_rows: int = flag(
        0, "print so many rows as the model sees them, and end", minimum=0, may_change=True, belongs="command"
    )
    dataset_samples: int = flag(
        512, "samples used of alpaca_sample, dummy, orca_math; of others only when passed", minimum=1
    )
    context_length: int = flag(512, "longest sample in tokens; longer ones are cut", minimum=2)
    packing: bool = flag(False, "fill rows of context_length with several samples that do not see each other")

    _training: str = section("training")
    batch_size: int = flag(1, "rows per process and forward pass", minimum=1, may_change=True)
    gradient_accumulation_steps: int = flag(1, "forward passes per optimizer step", minimum=1, may_change=True)
    global_batch_size: int = flag(
        -1,
        "rows of an optimizer step, over all processes: sets the accumulation; -1: as it comes",
        minimum=-1,
        may_change=True,
    )
    num_epochs: int = flag(1, "passes over the data", minimum=1, may_change=True)
    max_steps: int = flag(
        -1, "stop after this many optimizer steps; -1: at the end of the epochs", minimum=-1, may_change=True
    )
    lr: float = flag(1e-5, "peak learning rate", above=0.0)
    lr_scheduler: str = flag("constant", "all but constant warm up first", choices=tuple(SCHEDULES))
    lr_warmup_ratio: float = flag(0.1, "share of the steps that warm up", minimum=0.0, maximum=1.0)
    optimizer: str = flag(
        "adamw", "; ".join(f"{name}: {row.effect}" for name, row in OPTIMIZERS.items()), choices=tuple(OPTIMIZERS)
    )
    stochastic_rounding: bool = flag(
        True,
        f"{', '.join(_ROUNDING)}: weights stored in bf16 are rounded at random after a step, so that on average they "
        "learn as in fp32; to the nearest, small steps are lost",
    )
    optimizer_in_backward: bool = flag(
        False,
        "each parameter steps inside backward and frees its gradient at once: the same bits without the memory of "
        "gradients, for full fine-tuning; needs one forward pass a step, no clipping, no fp16",
        may_change=True,
    )
    wd: float = flag(0.1, "weight decay", minimum=0.0)
    apply_gradient_clipping: bool = flag(False, "clip the global gradient norm")
    grad_norm: float = flag(0.3, "the norm clipped to", above=0.0)
    precision: str = flag("bf16", "storage and compute precision", choices=tuple(PRECISIONS))
    seed: int = flag(42, "seeds adapters, data order and dropout", minimum=0, maximum=2**63)
    deterministic: bool = flag(False, "on GPUs too, every run of a command comes to the same bits; attention is slower")

    _checkpoints: str = section("checkpoints: a run that is interrupted goes on", may_change=True)
    save_every_steps: int = flag(0, "write a checkpoint every so many steps; 0: none", minimum=0)
    save_every_minutes: float = flag(0.0, "and every so many minutes; 0: none", minimum=0.0)
    keep_checkpoints: int = flag(2, "how many of the newest to keep", minimum=1)
    resume: str = flag(
        "false",
        "auto: the newest valid checkpoint in output_dir, or a new run; or a checkpoint's folder",
        belongs="place",
    )
    init_adapter: str | None = flag(None, "folder of a saved adapter to go on training, on new data")
    stop_at_step: int = flag(0, "write a checkpoint after this step and end; 0: no", minimum=0, belongs="place")
    stop_after_minutes: float = flag(
        0.0, "write a checkpoint after so many minutes and end; 0: no", minimum=0.0, belongs="place"
    )

    _validation: str = section("validation, at the end and on the way", may_change=True)
    eval_dataset: str | None = flag(None, "name or file, as of --dataset, that is not trained on")
    eval_split: str = flag("validation", "split of --eval_dataset, if it has several")
    eval_samples: int = flag(0, "or so many samples of --dataset, held out before training", minimum=0)
    eval_every_steps: int = flag(0, "validate every so many steps too", minimum=0)
    eval_generate: int = flag(0, "of so many questions, count the answers that greedy decoding gets right", minimum=0)
    save_best: bool = flag(False, "keep the checkpoint of the lowest validation loss; it becomes the result")
    early_stopping_patience: int = flag(
        0, "end after so many validations in a row without a lower loss; 0: no", minimum=0
    )

    _sharding: str = section("sharding and memory", may_change=True)
    world_size: int = flag(
        -1, "processes when started by plain `python`; -1: one per visible GPU", minimum=-1, belongs="place"
    )
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"), belongs="place")
    sharding_strategy: str = flag("full_shard", "what is sharded, over whom", choices=tuple(STRATEGIES))
    peer_gather: bool | str = flag(
        "auto",
        "copy weights and gradients out of the neighbours' memory, and keep adapters whole during a step, so that no "
        "block waits for NCCL; auto: on GPUs of one host that can, without CPU offload; false: FSDP2 gathers all",
        choices=(True, False, "auto"),
    )
    context_parallel: int = flag(
        1, "neighbouring processes that share each row, a part of its tokens each: rows too long for one", minimum=1
    )
    hybrid_shard_size: int = flag(-1, "processes that share one copy (hybrid_*); -1: those of a node", minimum=-1)
    use_cpu_offload: bool = flag(True, "keep parameters in host memory between uses")
    use_gradient_checkpointing: bool | str = flag(
        True,
        "recompute decoder blocks in backward; auto: only as many as the GPU's memory needs; false: none, but compiled "
        "blocks keep only products and attention",
        choices=(True, False, "auto"),
    )
    checkpoint_policy: str = flag(
        "full",
        "what checkpointed blocks keep beside their input, each more than the one before. full: nothing; adapters: "
        "A x and the output of DoRA's down projection; narrow: attention and products no wider than their input; "
        "products: all matrix products",
        choices=tuple(POLICIES),
    )
    reentrant_checkpointing: bool = flag(False, "use re-entrant checkpointing")
    embedding_on_host: bool = flag(True, "keep a frozen embedding, whole, in the host memory of each process (GPUs)")
    use_activation_cpu_offload: bool = flag(False, "keep hidden states that checkpointed blocks save in host memory")
    compute: str = flag(
        "precision",
        "products with frozen weights of blocks: as --precision says, or fp8, of 8-bit floats (Ada, Hopper, "
        "Blackwell): a third faster, and a little less exact",
        choices=("precision", "fp8"),
    )
    tile_tokens: int = flag(
        0,
        "rows with more tokens than this go through feed-forward layers so many at a time, for rows of tens of "
        "thousands (8192 fits them); 0: at once",
        minimum=0,
    )
    no_sync: bool = flag(False, "reduce gradients only at the last accumulation step")
    compile: bool = flag(True, "compile decoder blocks (CUDA with Triton; ignored elsewhere)")
    cuda_graphs: bool = flag(
        True, "replay small steps as CUDA graphs (one GPU; ignored elsewhere and where the family itself drops)"
    )
    fused_kernels: bool = flag(True, "base product and adapter in one operator; false: the plain definition")
    fused_loss: bool = flag(True, "never build the full logits; false: the plain definition")
    load_format: str = flag("safetensors", "dummy: random weights, no files", choices=("safetensors", "dummy"))
    quantized_cache: str | None = flag(
        None, "folder that keeps the packed base, so that later runs only read it", belongs="place"
    )
    attn_implementation: str = flag("auto", "attention of transformers: sdpa, eager, flash_attention_2, …")
    low_memory: bool = flag(True, "accepted for old commands; loading is always sharded")
    loading_workers: int = flag(-1, "accepted for old commands; every process streams its own rows")

    _output: str = section("output and logging", may_change=True)
    save_model: bool = flag(False, "write adapters or the model to output_dir")
    output_dir: str = flag("output", "where the result, metrics.jsonl and run.json go", belongs="place")
    overwrite: bool = flag(False, "replace a non-empty output_dir, and a file of --save_config", belongs="command")
    push_to_hub: str | None = flag(
        None, "upload the saved result to this private repository of the hub (org/name)", belongs="place"
    )
    log_to: str = flag("tqdm", f"where metrics are shown, several by comma: {', '.join(SINKS)}", several=True)
    project_name: str = flag("fsdp_qlora", "project (wandb, trackio), experiment (mlflow)")
    name: str | None = flag(None, "name of the run (wandb, trackio, mlflow)")
    group: str | None = flag(None, "group of runs (wandb, trackio)")
    entity: str | None = flag(None, "wandb entity")
    verbose: bool = flag(False, "print every flag and the sharded model")

    _launch: str = section("launch without torchrun", may_change=True)
    master_addr: str = flag("localhost", "address of process 0", belongs="place")
    master_port: str = flag("12355", "port of process 0", belongs="place")

    _profiling: str = section("profiling", may_change=True)
    profile_memory: bool = flag(False, "log allocated and reserved memory at every step, and into the profile")
    profile: bool = flag(False, "run torch.profiler")
    profiling_output: str = flag("profiles", "folder of the profiles", belongs="place")
    with_stack: bool = flag(False, "record Python stacks")
    with_shapes: bool = flag(False, "record tensor shapes")
    export_trace: bool = flag(True, "write a Chrome trace")
    export_memory_timeline: bool = flag(False, "write a memory timeline")
    wait_steps: int = flag(0, "profiler schedule: steps skipped", minimum=0)
    warmup_steps: int = flag(0, "profiler schedule: steps to warm up", minimum=0)
    active_steps: int = flag(2, "profiler schedule: steps recorded", minimum=1)
    repeat: int = flag(0, "profiler schedule: cycles; 0: until the end", minimum=0)
    profiling_frequency: int = flag(10, "profile every this many steps", minimum=1)

    explicit_flags: frozenset = field(default=frozenset(), init=False, repr=False)
    longest_sample: int = field(default=0, init=False, repr=False, compare=False)  # in tokens, once data has been read
    bits_plan_file: str | None = field(default=None, repr=False, compare=False)  # whose content --bits_plan is by then

    def __post_init__(self):
        for name in ("use_gradient_checkpointing", "peer_gather"):
            with suppress(ArgumentTypeError):  # what is neither true nor false is auto, or found wrong by its choices
                setattr(self, name, boolean(str(getattr(self, name))))
        with suppress(ValueError):  # `mixed`, or found wrong
            self.n_bits = int(self.n_bits)
        if self.bits_plan is not None:
            with suppress(ConfigError):  # a plan that cannot be read is found by `errors`
                given, self.bits_plan = self.bits_plan, bits.text_of(self.bits_plan)
                self.bits_plan_file = self.bits_plan_file if bits.is_text(given) else given

    @property
    def quantizer(self) -> str:
        return TRAIN_TYPES[self.train_type].quantizer

    @property
    def method(self) -> str:
        return TRAIN_TYPES[self.train_type].method

    @property
    def takes_double_scales(self) -> bool:
        """Whether all quantizers in use know --quant_scales double."""
        return all("double" in QUANTIZERS[name].scales for name in bits.quantizers_of(self))

    @property
    def source(self) -> str:
        """Where the base weights are: the expanded model's folder for Llama-Pro."""
        return self.llama_pro_path or self.model_name

    @property
    def stores_bf16(self) -> bool:
        """Whether weights that train are bf16 between steps."""
        return PRECISIONS[self.precision].stored == "bfloat16"

    @property
    def rounds_stochastically(self) -> bool:
        row = OPTIMIZERS[self.optimizer]
        return self.stores_bf16 and row.rounds and (self.stochastic_rounding or bool(row.own))

    @property
    def sinks(self) -> list[str]:
        """The names in --log_to, each once."""
        return list(dict.fromkeys(name.strip() for name in self.log_to.split(",")))

    @property
    def row_tokens(self) -> int:
        """Tokens that a process has of the longest row: what memory is planned for."""
        padded = -(-self.longest_sample // 64) * 64
        whole = min(padded, self.context_length) if padded and not self.packing else self.context_length
        return -(-whole // self.context_parallel)

    @property
    def validates(self) -> bool:
        return bool(self.eval_dataset or self.eval_samples)

    def errors(self) -> list[str]:
        """One line for each flag that cannot work beside the others."""
        found = [*self._quantizer_errors(), *bits.errors(self), *self._rounding_errors()]
        rounds = lambda row: row.quantizer != "none" or self.lora_init not in CORRECTING
        able = [n for n, row in TRAIN_TYPES.items() if self.lora_init in METHODS[row.method].starts and rounds(row)]
        if self.train_type not in able:
            why = f"not with {self.train_type}"
            if self.lora_init in CORRECTING and METHODS[self.method].adapts:
                why = f"corrects the rounding of a base, and {self.train_type} rounds none"
            found.append(f"--lora_init {self.lora_init}: {why}; use one of {', '.join(able)}")
        if not self.output_dir:
            found.append("--output_dir: name a folder")
        found += repository_errors(self.push_to_hub, flag="push_to_hub")
        if self.push_to_hub and not self.save_model:
            found.append(f"--push_to_hub {self.push_to_hub}: nothing is saved; add --save_model true")
        if self.eval_dataset and self.eval_samples:
            found.append("--eval_samples: --eval_dataset gives the validation samples already; drop one")
        if not self.validates:
            needing = ("eval_every_steps", "eval_generate", "save_best", "early_stopping_patience")
            found += [f"--{name}: add --eval_dataset or --eval_samples" for name in needing if getattr(self, name)]
        elif self.early_stopping_patience and not self.eval_every_steps:
            found.append("--early_stopping_patience: add --eval_every_steps")
        if self.method == "llama_pro" and not self.llama_pro_path:
            found.append(f"--llama_pro_path: {self.train_type} needs the folder that scripts/block_expansion.py wrote")
        if self.llama_pro_path and self.method != "llama_pro":
            found.append(
                f"--llama_pro_path: has no meaning for --train_type {self.train_type}; use bnb_llama_pro or its like"
            )
        found += [
            f"--{name} 0: means nothing; pass -1 for what fits"
            for name in ("world_size", "hybrid_shard_size", "global_batch_size")
            if getattr(self, name) == 0
        ]
        if self.max_steps == 0:
            found.append("--max_steps 0: trains nothing; pass -1 for all epochs")
        if self.context_length % (2 * self.context_parallel) and self.context_parallel > 1:
            nearest = -(-self.context_length // (2 * self.context_parallel)) * 2 * self.context_parallel
            found.append(
                f"--context_length {self.context_length}: {self.context_parallel} processes share no row of it evenly; "
                f"use {nearest}"
            )
        if self.peer_gather is True and self.use_cpu_offload:
            found.append("--peer_gather true: shards in host memory are not gathered so; add --use_cpu_offload false")
        computes = PRECISIONS[self.precision].autocast or PRECISIONS[self.precision].stored
        if self.compute == "fp8" and computes != "bfloat16":
            found.append(f"--compute fp8: adds up in bf16, not with --precision {self.precision}; use bf16")
        if self.compute == "fp8" and self.quantizer == "none" and not METHODS[self.method].fused:
            own = [name for name, row in TRAIN_TYPES.items() if METHODS[row.method].fused]
            found.append(f"--compute fp8: not with --train_type {self.train_type}; use one of {', '.join(own)}")
        if self.tile_tokens and self.checkpoint_policy != "full":
            found.append(
                f"--tile_tokens {self.tile_tokens}: not with --checkpoint_policy {self.checkpoint_policy}; use full"
            )
        if self.checkpoint_policy != "full" and self.reentrant_checkpointing:
            found.append(f"--checkpoint_policy {self.checkpoint_policy}: not with --reentrant_checkpointing true")
        if self.quantize_lm_head and self.quantizer == "none":
            found.append(f"--quantize_lm_head true: {self.train_type} quantizes nothing; use a bnb or hqq train type")
        if self.use_activation_cpu_offload and not self.use_gradient_checkpointing:
            found.append(
                "--use_activation_cpu_offload true: offloads checkpointed inputs; add --use_gradient_checkpointing true"
            )
        return found + self._optimizer_errors() + self.in_backward_errors() + self._sink_errors()

    def _sink_errors(self) -> list[str]:
        """One line for each name in --log_to that means nothing."""
        near = {name: get_close_matches(name, SINKS, n=1) for name in self.sinks if name not in SINKS}
        hints = {name: f"did you mean {found[0]}? " if found else "" for name, found in near.items()}
        return [f"--log_to {name}: {hint}choose from {', '.join(SINKS)}" for name, hint in hints.items()]

    def _optimizer_errors(self) -> list[str]:
        """One line for each flag that the optimizer cannot work beside."""
        row, given, found = OPTIMIZERS[self.optimizer], f"--optimizer {self.optimizer}", []
        if row.needs_cuda and self.device == "cpu":
            found.append(f"{given}: its states are pages of a GPU's memory, not with --device cpu; use adamw_8bit")
        if row.needs_fp32 and self.stores_bf16:
            found.append(
                f"{given}: bf16 weights round its averages away, not with --precision {self.precision}; "
                "use --precision bf16_autocast or fp32"
            )
        if row.schedules and self.lr_scheduler not in row.schedules:
            found.append(
                f"{given}: needs no falling rate, not with --lr_scheduler {self.lr_scheduler}; "
                f"use {' or '.join(row.schedules)}"
            )
        return found

    def in_backward_errors(self) -> list[str]:
        """One line for each flag that needs all gradients of a step at once."""
        if not self.optimizer_in_backward:
            return []
        table = (
            (self.gradient_accumulation_steps > 1, "sums gradients of several forward passes",
             f"--gradient_accumulation_steps {self.gradient_accumulation_steps}", "pass 1 and a larger --batch_size"),
            (self.apply_gradient_clipping, "needs the norm of all gradients before the first parameter steps",
             "--apply_gradient_clipping true", "pass false"),
            (self.precision == "fp16_autocast", "skips steps that overflow once all gradients are there",
             "--precision fp16_autocast", "pass bf16, bf16_autocast or fp32"),
        )  # fmt: skip
        ways = [(f"{given}, which {why}", way) for holds, why, given, way in table if holds]
        return [f"--optimizer_in_backward true: not with {given}; {way}" for given, way in ways]

    def _quantizer_errors(self) -> list[str]:
        """One line for each flag whose value the quantizer does not take."""
        row, found = QUANTIZERS[self.quantizer], []
        if not row.bits:
            given = "n_bits" in self.explicit_flags and self.n_bits != 4  # 4 is the default, and was often passed
            return (
                [f"--n_bits {self.n_bits}: {self.train_type} does not quantize{self._offering_bits()}"] if given else []
            )
        if self.n_bits == bits.MIXED and set(bits.OF_MIXED) <= set(row.bits):
            if self.bits_plan is not None:
                found.append(f"--n_bits {self.n_bits}: {bits.named(self)} says what each block has; drop one")
        elif self.n_bits not in row.bits:
            offers = f"{self.quantizer} offers {', '.join(map(str, row.bits))}"
            found.append(f"--n_bits {self.n_bits}: {offers}{self._offering_bits()}")
        if self.quant_scales not in row.scales:
            found.append(f"--quant_scales {self.quant_scales}: {self.quantizer} offers {', '.join(row.scales)}")
        if not row.codes and "quant_type" in self.explicit_flags:
            found.append(f"--quant_type {self.quant_type}: has no meaning for {self.quantizer}, which takes --n_bits")
        return found

    def _rounding_errors(self) -> list[str]:
        if self.train_for == "none":
            return []
        given, base = f"--train_for {self.train_for}", ROUNDINGS[self.train_for].quantizer
        able = [n for n, row in TRAIN_TYPES.items() if row.quantizer == base and METHODS[row.method].fused]
        if self.train_type not in able:
            return [f"{given}: not with --train_type {self.train_type}; use one of {', '.join(able)}"]
        table = (
            (self.n_bits != 4, f"--n_bits {self.n_bits}", "is of 4 bits"),
            (self.quant_type != "nf4", f"--quant_type {self.quant_type}", "has another code"),
            ("quant_scales" in self.explicit_flags, f"--quant_scales {self.quant_scales}", "has scales of its own"),
            (self.quant_group_size > 128, f"--quant_group_size {self.quant_group_size}", "has groups of 128 at most"),
            (self.lora_init != "default", f"--lora_init {self.lora_init}", "has the adapter in the base"),
            (bool(self.bits_plan), "--bits_plan", "is of 4 bits everywhere"),
            (bool(self.quantized_cache), "--quantized_cache", "reads the 16-bit weights again and again"),
            (self.quantize_lm_head, "--quantize_lm_head true", "keeps embedding and head in 16 bits"),
        )
        return [f"{flag}: not with {given}, which {why}; drop one" for holds, flag, why in table if holds]

    def _offering_bits(self) -> str:
        """The way out for --n_bits: train types of another quantizer."""
        wanted = set(bits.OF_MIXED) if self.n_bits == bits.MIXED else {self.n_bits}
        names = [f"{name}_*" for name, row in QUANTIZERS.items() if wanted <= set(row.bits)]
        return f"; use an {' or '.join(names)} train type" if names else ""

    def _without_effect(self) -> list[tuple[str, str]]:
        """Flags that do nothing beside the others, and why."""
        table = (
            (True, "every process loads only its own rows", ("low_memory",)),
            (True, "every process streams its own rows", ("loading_workers",)),
            (
                self.quantizer == "none",
                f"--train_type {self.train_type} quantizes nothing",
                ("n_bits", "quant_type", "quant_group_size", "quant_scales", "quantized_cache"),
            ),
            (
                not METHODS[self.method].adapts,
                f"--train_type {self.train_type} adds no adapters",
                ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora"),
            ),
            (self.train_for == "none", "--train_for is none", ("round_every",)),
            (not self.plan, "--plan is false, so this is a run on the GPUs that are here", ("plan_gpus",)),
            (self.plan and self.plan_gpus, "--plan_gpus says what to plan for", ("world_size", "device")),
            (self.plan and bool(self.show_rows), "--plan comes first", ("show_rows",)),
            (
                self.lora_init not in CORRECTING or bool(self.init_adapter),
                "--init_adapter is where it begins" if self.init_adapter else f"--lora_init is {self.lora_init}",
                ("init_samples",),
            ),
            (
                self.use_gradient_checkpointing is False,
                "--use_gradient_checkpointing is false",
                ("checkpoint_policy", "reentrant_checkpointing"),
            ),
            (
                STRATEGIES[self.sharding_strategy].copies == "processes",
                "--sharding_strategy ddp shards nothing",
                ("peer_gather",),
            ),
            (self.method == "full", "--train_type full trains everything", ("train_router",)),
            (not self.apply_gradient_clipping, "--apply_gradient_clipping is false", ("grad_norm",)),
            (not self.stores_bf16, f"--precision {self.precision} stores no bf16 weights", ("stochastic_rounding",)),
            (
                self.stores_bf16 and not OPTIMIZERS[self.optimizer].rounds,
                f"--optimizer {self.optimizer} rounds to the nearest",
                ("stochastic_rounding",),
            ),
            (
                self.stores_bf16 and bool(OPTIMIZERS[self.optimizer].own),
                f"--optimizer {self.optimizer} always rounds at random",
                ("stochastic_rounding",),
            ),
            (self.lr_scheduler == "constant", "--lr_scheduler is constant", ("lr_warmup_ratio",)),
            (self.max_steps > 0, "--max_steps says how long the run is", ("num_epochs",)),
            (True, f"--log_to is {self.log_to}", self._unread_names()),
            (not self.profile, "--profile is false", PROFILING),
            (
                STRATEGIES[self.sharding_strategy].copies != "nodes",
                f"--sharding_strategy is {self.sharding_strategy}",
                ("hybrid_shard_size",),
            ),
        )
        return [(name, why) for holds, why, names in table if holds for name in names]

    def _unread_names(self) -> tuple[str, ...]:
        """Flags that name a run, of which none of --log_to takes notice."""
        read = {name for sink in self.sinks for name in SINKS[sink].naming}
        return tuple(name for name in ("project_name", "name", "group", "entity") if name not in read)

    def notes(self) -> list[str]:
        """What the user asked for that has no effect here, or that was changed, said once at start."""
        idle = [(name, why) for name, why in self._without_effect() if name in self.explicit_flags]
        said = [f"--{name} has no effect: {why}" for name, why in idle]
        if self.use_cpu_offload and self.gradient_accumulation_steps > 1 and not self.no_sync:
            said.append("--no_sync false with CPU offload: gradients go to the host at every accumulation step")
        if self.use_activation_cpu_offload and self.checkpoint_policy != "full" and not self.compile:
            said.append("--use_activation_cpu_offload with --compile false: only the inputs of blocks leave the GPU")
        if self.train_for != "none":
            often = f"rounded anew every {self.round_every} steps, before validations and at the end"
            export = f"export it by --infer_type {ROUNDINGS[self.train_for].infer_type}"
            said.append(f"--train_for {self.train_for}: the base is the merged weight, {often}; {export}")
        nearest = self.stores_bf16 and not self.rounds_stochastically
        if nearest and self.lr <= ROUNDED_AWAY_LR:
            ways = [] if OPTIMIZERS[self.optimizer].rounds else ["--optimizer adamw"]
            ways += [] if self.stochastic_rounding else ["--stochastic_rounding true"]
            said.append(
                f"--lr {self.lr:g} with --precision {self.precision}: bf16 weights round updates of this size away; "
                f"{' with '.join(ways)} rounds at random instead, --precision bf16_autocast keeps weights in fp32"
            )
        starts_with_weight = self.lora_init != "default"
        touching = [f"--lora_dropout {self.lora_dropout:g} drops"] if self.lora_dropout else []
        touching += [f"--wd {self.wd:g} shrinks"] if self.wd else []
        if starts_with_weight and touching:
            said.append(
                f"--lora_init {self.lora_init}: the adapter holds a part of the weight itself, which "
                f"{' and '.join(touching)}; 0 leaves it alone"
            )
        if self.no_sync and self.gradient_accumulation_steps == 1:
            said.append("--no_sync has no effect with --gradient_accumulation_steps 1")
        return said
