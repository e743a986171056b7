"""llama.cpp's format: one file with hyperparameters, tokenizer and weights, for llama.cpp, Ollama and LM Studio."""

import math
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say
from fsdp_utils.core.safetensors_io import refuse_full_disk
from fsdp_utils.export.formats import Merged
from fsdp_utils.export.vocabulary import write_vocabulary
from fsdp_utils.folders.describe import generation_folder, tokenizer_of
from fsdp_utils.folders.documents import end_tokens
from fsdp_utils.folders.names import GGUF_FILE

Kind = gguf.GGMLQuantizationType
WAY_OUT = "use --infer_type merged, then llama.cpp's convert_hf_to_gguf.py"
KINDS = {"f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "f32": Kind.F32}
FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "f32": gguf.LlamaFileType.ALL_F32,
}
SIXTEEN_BITS = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
ROPE_FREQS = "rope_freqs.weight"


class Architecture(NamedTuple):
    """pairs: its rotary embedding turns neighbours (2i, 2i + 1), where transformers turns halves (i, i + n/2)."""

    arch: gguf.MODEL_ARCH
    pairs: bool
    biases: tuple[str, ...]  # flags of the configuration whose biases llama.cpp adds, too


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True, ("attention_bias", "mlp_bias")),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, True, ()),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False, ()),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False, ()),
}


class GGUF(Merged):
    """The merged model in one file. What llama.cpp computes otherwise is refused before a weight is read."""

    def __init__(self, trained, options):
        super().__init__(trained, options)
        self.dtype = torch.float32  # in which the report loads it: bf16 would hide what f16 keeps
        self.kind, self.config = KINDS[options.gguf_type], trained.model_config
        self._check()
        self.architecture = ARCHITECTURES[self.config.model_type]
        self.names = self._names()
        self.writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[self.architecture.arch])
        self._describe()

    def _check(self) -> None:
        """Raises UserError for a model that llama.cpp does not compute as transformers does."""
        kind = self.config.model_type
        if kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"--infer_type gguf: {kind} is none of {known}; {WAY_OUT}")
        odd = {
            "hidden_act": self.config.hidden_act not in ("silu", "swish"),
            "partial_rotary_factor": self.rope.get("partial_rotary_factor", 1.0) != 1.0,
            "rope_type": self.rope.get("rope_type") not in ROPE_TYPES,
            "use_sliding_window": getattr(self.config, "use_sliding_window", False),
        }
        biases = {"attention_bias", "mlp_bias"} - set(ARCHITECTURES[kind].biases)
        odd |= {name: getattr(self.config, name, False) for name in biases}
        for name in (name for name, found in odd.items() if found):
            value = self.rope.get(name, getattr(self.config, name, None))
            raise UserError(f"--infer_type gguf: llama.cpp computes no {kind} with {name} {value}; {WAY_OUT}")
        window = getattr(self.config, "sliding_window", None)
        if kind == "mistral" and window:
            say(f"note: llama.cpp attends to all tokens; beyond {window}, the model was trained with a sliding window")

    def _names(self) -> dict[str, str]:
        """What llama.cpp calls each tensor."""
        known = gguf.get_tensor_name_map(self.architecture.arch, self.config.num_hidden_layers)
        names = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in self.trained.shapes}
        for name in (name for name, found in names.items() if found is None):
            raise UserError(f"--infer_type gguf: llama.cpp knows no {name} in a {self.config.model_type}; {WAY_OUT}")
        return names

    @property
    def rope(self) -> dict:
        return self.config.rope_parameters

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    # --- what the file says -------------------------------------------------------------------------------------------

    def _describe(self) -> None:
        config, writer, run = self.config, self.writer, self.trained.run
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(run.folder.name)
        writer.add_file_type(FILE_TYPES[self.options.gguf_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        self._describe_rope()
        ends = end_tokens(generation_folder(run))
        write_vocabulary(writer, tokenizer_of(run), size=config.vocab_size, ends=ends, named=str(run.folder))

    def _describe_rope(self) -> None:
        rope, writer = self.rope, self.writer
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            before = rope.get("original_max_position_embeddings") or self.config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(before)
            for name in ("beta_fast", "beta_slow"):
                if rope.get(name) is not None:
                    getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])

    def rope_freqs(self) -> torch.Tensor | None:
        """What llama.cpp divides the frequencies by, fp32 `[head_dim / 2]`: the llama3 scaling has no other place."""
        if self.rope["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = self.rope["rope_theta"] ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        return plain / scaled

    def misread(self) -> str | None:
        known = dict(llama=self.head_dim, qwen3=128).get(self.writer.arch, self._divided)
        odd = {
            f"{self.rope['rope_type']} scaling of the rotary embedding": self.rope["rope_type"] != "default",
            "biases of a llama": any(getattr(self.config, name, False) for name in self.architecture.biases),
            f"heads of {self.head_dim}": self.head_dim != known,
        }
        return next((f"transformers does not read {what} from GGUF" for what, found in odd.items() if found), None)

    @property
    def _divided(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    # --- weights ------------------------------------------------------------------------------------------------------

    def kind_of(self, name: str, shape: tuple[int, ...]) -> Kind:
        """How a tensor is stored: llama.cpp adds and multiplies vectors in fp32 only, and a block of Q8_0 is 32
        numbers of one row."""
        if len(shape) == 1:
            return Kind.F32
        return Kind.F16 if self.kind == Kind.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[Kind.Q8_0][0] else self.kind

    def specs(self):
        freqs = self.rope_freqs()
        extra = {} if freqs is None else {ROPE_FREQS: (Kind.F32, tuple(freqs.shape))}
        shapes = self.trained.shapes.items()
        return extra | {self.names[name]: (self.kind_of(name, shape), shape) for name, shape in shapes}

    def tensors(self):
        if (freqs := self.rope_freqs()) is not None:
            yield ROPE_FREQS, freqs
        places = {stored: name for name in self.trained.shapes for stored in self.trained.weights.pieces(name)}
        for stored, tensor in super().tensors():
            name = places[stored]
            dtype = SIXTEEN_BITS.get(self.kind_of(name, tensor.shape), torch.float32)
            yield self.names[name], self.in_dtype(name, self._turned(name, tensor), dtype)

    def _turned(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of queries and keys in the order that llama.cpp turns them in: those of a head lie `[2, n/2]` here,
        `[n/2, 2]` there."""
        heads = dict(q_proj=self.config.num_attention_heads, k_proj=self.config.num_key_value_heads)
        count = heads.get(name.split(".")[-2])
        if not self.architecture.pairs or count is None:
            return tensor
        return tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)

    def write(self, tokenizer, folder, *, target, max_shard_bytes):
        """Hyperparameters and places first, then one tensor after another, so that no two are in memory."""
        specs = self.specs()
        sizes = {name: _nbytes(*spec) for name, spec in specs.items()}
        refuse_full_disk(folder, {name: (torch.uint8, (size,)) for name, size in sizes.items()})
        for name, (kind, shape) in specs.items():
            self.writer.add_tensor_info(name, shape, np.dtype(np.float32), sizes[name], raw_dtype=kind)
        self.writer.write_header_to_file(Path(folder) / GGUF_FILE)
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for name, tensor in self.tensors():
            self.writer.write_tensor_data(_stored(name, tensor.cpu(), specs[name][0]))
        self.writer.close()


def _nbytes(kind: Kind, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _stored(name: str, tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    """The bytes of values in the dtype of their kind, or fp32 to quantize."""
    tensor = tensor.contiguous()
    if kind == Kind.BF16:
        return tensor.view(torch.int16).numpy()
    if kind != Kind.F16:
        return gguf.quants.quantize(tensor.numpy(), kind)
    if not tensor.isfinite().all():
        raise UserError(f"--gguf_type f16: {name} has numbers above 65504, which it cannot hold; use bf16")
    return tensor.numpy()
