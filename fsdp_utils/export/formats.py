"""What a format is, the plain one, and the writing of a complete model folder."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.safetensors_io import StreamingWriter
from fsdp_utils.export.trained import TrainedWeights
from fsdp_utils.folders.describe import generation_folder, tokenizer_folder
from fsdp_utils.folders.documents import describe_generation, describe_model, describe_tokenizer
from fsdp_utils.folders.names import GENERATION_CONFIG
from fsdp_utils.options import DTYPES
from methods.llama_pro import EXPANDED_LAYERS_FILE

Spec = tuple[torch.dtype, tuple[int, ...]]


class Format:
    """One way to store a trained model: how linears are packed, and what config.json says of it.

    Args:
        options: `dtype`, and what the format itself takes; see `ExportConfig` of prepare_weights.py.

    Attributes:
        packed: paths of the linears that are stored in the format's own way; everything else is stored in `dtype`.
        reader: package beside transformers that loading the result needs.

    Raises:
        UserError: a run that cannot be stored so.
    """

    reader: str | None = None

    def __init__(self, trained: TrainedWeights, options):
        self.trained, self.options, self.dtype = trained, options, getattr(torch, DTYPES[options.dtype])
        self.packed = set(self.to_pack())

    def to_pack(self) -> list[str]:
        """Every linear of the decoder blocks, except in blocks that were trained in 16 bits."""
        self._check_linears()
        new = tuple(f"{block}." for block in self.trained.new_blocks)
        return [path for path in self.trained.in_blocks if not path.startswith(new)]

    def _check_linears(self) -> None:
        """Raises UserError where stock loaders would look for other layers than those we pack."""
        odd = {type(self.trained.linears[path]).__name__ for path in self.trained.in_blocks} - {"Linear"}
        if odd or self.trained.has_conv1d:
            kind = odd.pop() if odd else "Conv1D"
            raise UserError(f"{self.trained.run.folder}: stock loaders read no packed {kind} layers; use merged")

    def unpacked_linears(self) -> list[str]:
        """Paths of the linears that a stock loader must leave alone."""
        return [path for path in self.trained.linears if path not in self.packed]

    def check_group(self, group_size: int, *, way_out: str) -> None:
        """Raises UserError if a row of a packed linear is no whole number of groups."""
        for path in self.packed:
            width = self.trained.linears[path].in_features
            if width % group_size:
                raise UserError(f"{path}: its {width} inputs are no multiple of the group size {group_size}; {way_out}")

    def linear_specs(self, path: str) -> dict[str, Spec]:
        """Name, dtype and shape of what is stored for a packed linear."""
        raise NotImplementedError

    def linear_tensors(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors announced by `linear_specs`."""
        raise NotImplementedError

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
            plain = {self.trained.weights.stored_name(name): (self._dtype_of(name), shape)}
            found |= self.linear_specs(path) if path in self.packed else plain
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of the whole model, computed one parameter at a time."""
        for name in tqdm(self.trained.shapes, desc="exporting", unit="tensor"):
            path = name.removesuffix(".weight")
            if path in self.packed:
                yield from self.linear_tensors(path).items()
                continue
            whole = self.trained.merged(path) if path in self.trained.linears else self.trained.tensor(name)
            yield self.trained.weights.stored_name(name), whole.to(self._dtype_of(name))

    def _dtype_of(self, name: str) -> torch.dtype:
        return self.trained.own_dtypes.get(name, self.dtype)


class Merged(Format):
    """A plain Hugging Face folder; adapters are folded into the dequantized base they were trained on."""

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
    if not (folder / GENERATION_CONFIG).exists():
        GenerationConfig.from_model_config(chosen.trained.model_config).save_pretrained(folder)
    quantization = chosen.quantization_config()
    untied = chosen.trained.weights.untied
    describe_model(folder, run.base, dtype=chosen.dtype, untied=untied, quantization_config=quantization)
