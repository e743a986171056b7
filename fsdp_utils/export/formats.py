"""What a format is, the plain one, and the writing of a complete model folder."""

import shutil
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.folders import write_json
from fsdp_utils.core.ranks import say
from fsdp_utils.core.safetensors_io import StreamingWriter
from fsdp_utils.export.gptq import Calibrated, Grid, Rounded, round_together
from fsdp_utils.export.trained import TrainedWeights
from fsdp_utils.folders.describe import generation_folder, task_of, tokenizer_folder
from fsdp_utils.folders.documents import describe_generation, describe_model, describe_tokenizer
from fsdp_utils.folders.names import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, GENERATION_CONFIG
from fsdp_utils.model.checkpoint import Cut
from fsdp_utils.options import DTYPES
from methods import ROUNDINGS
from methods.adapter import KEY_PREFIX, LORA_A, LORA_B, Pair
from methods.kernels.rounding import at_random
from methods.llama_pro import EXPANDED_LAYERS_FILE
from methods.quantizers.bnb import Bnb4bit

Spec = tuple[torch.dtype, tuple[int, ...]]


class Format:
    """One way to store a trained model: how linears are packed, and what config.json says of it.

    Args:
        options: `dtype`, and what the format itself takes; see `ExportConfig` of prepare_weights.py.

    Attributes:
        packed: paths of the linears that are stored in the format's own way; everything else is stored in `dtype`.
        reader: package beside transformers that loading the result needs.
        for_all_tasks: whether models of other tasks than language models can be stored so.
        packs_experts: whether the matrices of experts are packed like linears, where files have them one by one.
        calibrates: whether weights are rounded to a grid, which `calibrate` can do by their inputs.

    Raises:
        UserError: a run that cannot be stored so.
    """

    reader: str | None = None
    calibrates = packs_experts = for_all_tasks = False

    def __init__(self, trained: TrainedWeights, options):
        self.trained, self.options, self.dtype = trained, options, getattr(torch, DTYPES[options.dtype])
        task = task_of(trained.run)
        if not (self.for_all_tasks or task.causal):
            raise UserError(f"{trained.run.folder}: is a {task.noun}; export it by --infer_type merged or bnb_nf4")
        self.packed, self.calibrated = set(self.to_pack()), None

    @property
    def better(self) -> str:
        """The flags of a format that keeps what was learned, whatever it was."""
        of_training = self.trained.folded and ROUNDINGS[self.trained.run.config.train_for].infer_type
        if of_training and of_training != self.options.infer_type:
            return f"--infer_type {of_training}, which it was trained for"
        alike = isinstance(self.trained.quantizer, Bnb4bit) and not (self.trained.stacks or of_training)
        exact = self.trained.run.kind == "adapter" and alike
        return "--infer_type bnb_dora, which is exact" if exact else "--infer_type merged"

    def holds(self, kind: type) -> bool:
        """Whether the base that a run learned on, rounded by quantizers of a kind, is what it stores (--train_for)."""
        folded = self.trained.folded
        if folded and not isinstance(self.trained.quantizer, kind):
            asked = self.trained.run.config.train_for
            say(f"note: it learned on the rounding of --train_for {asked}, and not on this one; use {self.better}")
        return folded and isinstance(self.trained.quantizer, kind)

    def to_pack(self) -> list[str]:
        """Every linear of the decoder blocks, except in blocks that were trained in 16 bits."""
        self._check_linears()
        new = tuple(f"{block}." for block in self.trained.new_blocks)
        kept = self.trained.never_packed
        return [path for path in self.trained.in_blocks if not path.startswith(new) and not path.endswith(kept)]

    def _check_linears(self) -> None:
        """Raises UserError where stock loaders would look for other layers than those we pack."""
        odd = {type(self.trained.linears[path]).__name__ for path in self.trained.in_blocks} - {"Linear"}
        if odd or self.trained.has_conv1d:
            kind = odd.pop() if odd else "Conv1D"
            raise UserError(f"{self.trained.run.folder}: stock loaders read no packed {kind} layers; use merged")
        given = f"--infer_type {self.options.infer_type}: {self.trained.run.folder}"
        for path in self.trained.stacks:
            if len(self.trained.weights.pieces(path)) == 1:
                stored = "its files have all matrices of its experts in one tensor, for which no packed form is read"
                raise UserError(f"{given}: {stored}; use merged")
        if self.trained.stacks and not self.packs_experts:  # they would stay in 16 bits, most of the model
            raise UserError(f"{given}: its experts cannot be packed so; use merged or w4a16")

    def unpacked_linears(self) -> list[str]:
        """Paths of the linears, and of what chooses experts, that a stock loader must leave alone, as the base's files
        name them."""
        paths = [*(path for path in self.trained.linears if path not in self.packed), *self.trained.routers]
        return [self._place(path) for path in dict.fromkeys(paths)]

    def _place(self, path: str) -> str:
        stored = next(iter(self.trained.weights.pieces(f"{path}.weight"))).removesuffix(".weight")
        # a tied head is stored as the embedding, and is still the head that is to be left alone
        return stored if stored.rpartition(".")[2] == path.rpartition(".")[2] else path

    def matrices(self, name: str) -> dict[str, Cut]:
        """Of a stack of experts in files that have them one by one: the path of each, and how it is cut out."""
        if not self.packs_experts or name not in self.trained.stacks:
            return {}
        return {stored.removesuffix(".weight"): cut for stored, cut in self.trained.weights.pieces(name).items()}

    def matrix_specs(self, path: str, shape: tuple[int, int]) -> dict[str, Spec]:
        """`linear_specs` of a matrix `[out, in]` that is none of a linear."""
        raise NotImplementedError  # only what packs experts calls it

    def matrix_tensors(self, path: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors announced by `matrix_specs`, of a weight fp32 `[out, in]`."""
        raise NotImplementedError  # only what packs experts calls it

    def check_group(self, group_size: int, *, way_out: str) -> None:
        """Raises UserError if a row of a packed linear is no whole number of groups."""
        widths = {path: self.trained.linears[path].in_features for path in self.packed}
        widths |= {path: self.trained.shapes[path][-1] for path in self.trained.stacks}
        for path, width in widths.items():
            if width % group_size:
                raise UserError(f"{path}: its {width} inputs are no multiple of the group size {group_size}; {way_out}")

    def linear_specs(self, path: str) -> dict[str, Spec]:
        """Name, dtype and shape of what is stored for a packed linear."""
        raise NotImplementedError

    def linear_tensors(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors announced by `linear_specs`."""
        raise NotImplementedError

    def grid(self, path: str, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Grid:
        """The values that the weights of a packed linear can have; see `gptq.Calibrated`."""
        raise NotImplementedError  # only what rounds to a grid calls it

    def rounded(self, path: str) -> Rounded:
        """What is stored of a packed linear; its values are on the grid where it was calibrated, else not yet."""
        return self.calibrated(path) if self.calibrated else self.solve(path, None)

    def solve(self, path: str, hessian: torch.Tensor | None) -> Rounded:
        """`rounded`, by the inputs of the linear where they are known."""
        weight = self.trained.merged(path)
        grid = self.grid(path, weight, None if hessian is None else hessian.diagonal())
        return Rounded(weight if hessian is None else round_together(weight, grid, hessian), grid)

    def calibrate(self, model: nn.Module, rows: Iterable[torch.Tensor]) -> None:
        """Rounds packed linears by what they get as inputs when the trained `model` runs on `rows`."""
        self.calibrated = Calibrated(self.trained, model, rows, packed=self.packed, solve=self.solve)

    def quantization_config(self) -> dict | None:
        """What config.json says, None for plain weights."""
        return None

    def finish(self, folder: Path, *, target: Path) -> None:
        """Writes what belongs beside the model; `target` is the name that `folder` will have."""

    def misread(self) -> str | None:
        """Why what transformers makes of the result is not what was written, if that is so: there is no report then."""

    def write(self, tokenizer, folder: Path, *, target: Path, max_shard_bytes: int) -> None:
        """Writes the complete folder; `target` as of `finish`.

        Raises:
            UserError: the disk is too small, before anything is written.
        """
        write_weights(self, folder, max_shard_bytes=max_shard_bytes)
        write_rest(self, tokenizer, folder, target=target)

    def specs(self) -> dict[str, Spec]:
        """Of every tensor in the order they are written, under the names of the base's files."""
        found = {}
        for name, shape in self.trained.shapes.items():
            path = name.removesuffix(".weight")
            if path in self.packed:
                found |= self.linear_specs(path)
                continue
            whole, dtype = torch.empty(shape, device="meta"), self._dtype_of(name)
            if matrices := self.matrices(name):
                for stored, cut in matrices.items():
                    found |= self.matrix_specs(stored, tuple(cut(whole).shape))
                continue
            found |= {stored: (dtype, tuple(cut(whole).shape)) for stored, cut in self._pieces(name)}
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of the whole model, computed one parameter at a time."""
        for name in tqdm(self.trained.shapes, desc="exporting", unit="tensor"):
            path = name.removesuffix(".weight")
            if path in self.packed:
                yield from self.linear_tensors(path).items()
                continue
            merges = path in self.trained.linears or path in self.trained.adapted()
            whole = self.trained.merged(path) if merges else self.trained.tensor(name)
            if matrices := self.matrices(name):
                for stored, cut in matrices.items():
                    yield from self.matrix_tensors(stored, cut(whole).float()).items()
                continue
            whole = self.in_dtype(name, whole, self._dtype_of(name))
            yield from ((stored, cut(whole).contiguous()) for stored, cut in self._pieces(name))

    def _pieces(self, name: str):
        """What the base's files call a tensor of the model, or the pieces of one, and how each is cut from it."""
        return self.trained.weights.pieces(name).items()

    def in_dtype(self, name: str, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the model in the dtype it is stored in. What training changed is rounded at random where that
        has 16 bits: to the nearest, changes below half a unit in the last place are lost. The same bits in any run of
        the export."""
        if self.options.rounding == "nearest" or dtype.itemsize != 2 or not self.trained.has_changed(name):
            return whole.to(dtype)
        return at_random(whole.float(), dtype, key=int.from_bytes(sha256(name.encode()).digest()[:4]))

    def _dtype_of(self, name: str) -> torch.dtype:
        return self.trained.own_dtypes.get(name, self.dtype)


def write_adapter(trained: TrainedWeights, pairs: dict[str, Pair], folder: Path, *, target: Path) -> None:
    """Writes a plain LoRA for the base in `target` into the subfolder `adapter/`.

    Args:
        pairs: by linear, A `[r, in]` and B `[out, r]` of the run's rank, to be scaled as the run scales them.
    """
    # fp32: rounding B after scaling would be the only error of a format that is exact otherwise
    tensors = {
        f"{KEY_PREFIX}{path}.{name}": tensor.float().cpu().contiguous()
        for path, pair in pairs.items()
        for name, tensor in zip((LORA_A, LORA_B), pair, strict=True)
    }
    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir()
    save_file(tensors, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    rank = trained.method.peft_rank(trained.method.config.lora_rank)  # not of what the run saved, which may hold more
    named = dict(base_model_name_or_path=str(target), use_dora=False, inference_mode=True)
    write_json(adapter / ADAPTER_CONFIG, trained.run.adapter | rank | named)


class Merged(Format):
    """A plain Hugging Face folder; adapters are folded into the dequantized base they were trained on."""

    for_all_tasks = True

    @property
    def better(self):
        return "--rounding random" if self.options.rounding == "nearest" else "--dtype fp32"

    def to_pack(self):
        return []


def write_weights(chosen: Format, folder: Path, *, max_shard_bytes: int) -> None:
    """Streams the weights into `folder`.

    Raises:
        UserError: the disk is too small for them, before anything is written.
    """
    writer = StreamingWriter(folder, chosen.specs(), max_shard_bytes)
    for name, tensor in chosen.tensors():
        writer.write(name, tensor)
    writer.finish()


def write_rest(chosen: Format, tokenizer, folder: Path, *, target: Path) -> None:
    """Tokenizer, generation config, what the format adds, and last config.json, without which nothing loads."""
    run = chosen.trained.run
    describe_tokenizer(folder, tokenizer_folder(run), tokenizer=tokenizer)
    chosen.finish(folder, target=target)
    if (run.folder / EXPANDED_LAYERS_FILE).exists():
        shutil.copyfile(run.folder / EXPANDED_LAYERS_FILE, folder / EXPANDED_LAYERS_FILE)
    describe_generation(folder, generation_folder(run), tokenizer=tokenizer, is_model=True)
    task = task_of(run)
    if not (folder / GENERATION_CONFIG).exists() and task.writes:
        GenerationConfig.from_model_config(chosen.trained.model_config).save_pretrained(folder)
    quantization = chosen.quantization_config()
    untied = chosen.trained.weights.untied
    more = task.described(chosen.trained.model_config) | dict(quantization_config=quantization)
    describe_model(folder, run.base, dtype=chosen.dtype, untied=untied, **more)
