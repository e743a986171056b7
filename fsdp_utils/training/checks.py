"""What is tried out on a loaded model before the first step, since no configuration tells it."""

from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.core.processes import all_reduce
from fsdp_utils.data.batches import model_inputs, with_targets
from fsdp_utils.data.parts import Part
from fsdp_utils.model import attention
from fsdp_utils.sharding.prepared import Prepared
from fsdp_utils.sharding.tiles import give


def try_out(prepared: Prepared, config) -> None:
    """Raises UserError for what the flags ask of a family that it does not bear. Collective."""
    if config.packing:
        check_packing(prepared.model, device=prepared.device, autocast=prepared.autocast)
    if config.context_parallel > 1:
        check_sharing(prepared, config)
    if config.tile_tokens:
        check_tiles(prepared, config)


@contextmanager
def _briefly(device: torch.device, autocast: torch.dtype | None):
    """For short rows, which are not worth compiling for, of a model in eval mode."""
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), eager, torch.autocast(device.type, autocast) if autocast else nullcontext():
        yield


def _random_ids(model: nn.Module, *shape: int) -> torch.Tensor:
    """Tokens on the CPU, the same in every process."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def check_packing(model: nn.Module, *, device: torch.device, autocast: torch.dtype | None) -> None:
    """Runs two rows of two samples that differ in the first: some families (OPT, Bloom, Falcon) attend across samples,
    whatever `position_ids` say.

    Raises:
        UserError: the second sample's logits depend on the first.
    """
    length = 8
    ids = _random_ids(model, 2, 2 * length)
    ids[1, length:] = ids[0, length:]
    places = torch.arange(length).repeat(2).expand(2, -1)
    batch = with_targets(dict(input_ids=ids, labels=ids, position_ids=places))
    inputs = model_inputs({name: tensor.to(device) for name, tensor in batch.items()})
    with _briefly(device, autocast):
        try:
            one, other = model.eval()(**inputs, use_cache=False).logits[:, length:].float()
        except (
            ImportError,
            ValueError,
        ) as error:  # a state-space layer that needs another kernel to keep samples apart
            raise UserError(f"--packing true: {first_line(error)}; or pass --packing false") from None
    if (one - other).norm() > 1e-2 * one.norm():
        kind = model.config.model_type
        raise UserError(f"--packing true: samples in one row see each other in {kind} models; pass --packing false")


def check_sharing(prepared: Prepared, config) -> None:
    """Runs a short row whole, with transformers' attention, and shared: what mixes tokens otherwise than by attention,
    or counts positions itself, would take a part for a row.

    Raises:
        UserError: the logits differ.
    """
    model, device, part = prepared.model.eval(), prepared.device, Part.of_rows(config, prepared.model.config)
    text = model.config.get_text_config()
    reach = attention.window_of(model) or 0
    tokens = 8 + (reach if reach < config.context_length else 0)  # so that the window matters
    length = min(-(-tokens // part.multiple) * part.multiple, config.context_length)
    ids = _random_ids(model, 1, length).to(device)
    columns = part.columns(length).to(device)
    shared = dict(input_ids=ids[:, columns], position_ids=columns[None], **prepared.sharing)
    stock, ours = "sdpa" if model._supports_sdpa else "eager", text._attn_implementation
    found = []
    with _briefly(device, prepared.autocast):
        for text._attn_implementation, inputs in ((stock, dict(input_ids=ids)), (ours, shared)):
            found.append(model(**inputs, use_cache=False).logits.float())
    whole, mine = found[0][:, columns], found[1]
    difference = all_reduce(((mine - whole).norm() / whole.norm()).item(), device, op=dist.ReduceOp.MAX)
    # kernels differ by a few per cent in 16 bits; a part that is taken for a row, by about as much as there is
    if not difference < (1e-3 if config.precision == "fp32" else 0.1):
        given, kind = f"--context_parallel {config.context_parallel}", model.config.model_type
        raise UserError(f"{given}: a row that processes share is another row to {kind} models; pass 1")


def check_tiles(prepared: Prepared, config) -> None:
    """Runs a short row with and without tiles: a layer that mixes tokens would come to something else.

    Raises:
        UserError: the logits differ.
    """
    model, device = prepared.model.eval(), prepared.device
    ids = _random_ids(model, 1, 24).to(device)

    def logits(tokens: int) -> torch.Tensor:
        give(model, tokens)
        with _briefly(device, prepared.autocast):
            return model(input_ids=ids, use_cache=False).logits.float()

    whole, by_tiles = logits(24), logits(8)
    give(model, config.tile_tokens)
    if (by_tiles - whole).norm() > 1e-2 * whole.norm():
        given, kind = f"--tile_tokens {config.tile_tokens}", model.config.model_type
        raise UserError(f"{given}: feed-forward layers of {kind} models see more than their own token; pass 0")
