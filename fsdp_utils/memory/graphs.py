"""Which micro-batches are replayed as CUDA graphs: those that keep a GPU busy for less time than their launch takes."""

import torch
from torch import nn

from fsdp_utils.options import OWN_ATTENTION
from methods.targets import block_linears, decoder_blocks, family_dropout

WORK = 10**12  # tokens x weights of a block; beyond it the host keeps ahead, and a graph would only hold memory


def graph_tokens(model: nn.Module, config, *, mesh, device: torch.device) -> int:
    """The most tokens of a micro-batch that is captured; 0 where a run's steps cannot be.

    One GPU has to do it all, without random numbers, without copies to the host or from there, and keep the gradients
    in their place. Attention has to be ours: of transformers' masks some are copied to the host, and where batches need
    none it makes them all the same while a graph is recorded, for which compiled blocks would be compiled again.
    """
    one_gpu = device.type == "cuda" and mesh is None
    masks = model.config.get_text_config()._attn_implementation != OWN_ATTENTION
    moving = config.use_activation_cpu_offload or config.optimizer_in_backward
    if not config.cuda_graphs or not one_gpu or masks or moving or family_dropout(model):
        return 0
    weights = sum(linear.in_features * linear.out_features for linear in block_linears(model).values())
    return WORK * len(decoder_blocks(model)) // weights
