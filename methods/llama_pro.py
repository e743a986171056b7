"""Llama-Pro (arXiv:2401.02415): only the blocks that block expansion added train; they stay in 16 bits."""

import json
import re
from pathlib import Path

from fsdp_utils.core.errors import UserError
from methods.base import Method
from methods.targets import decoder_blocks

EXPANDED_LAYERS_FILE = "expanded_layers.json"


def expanded_layers(folder: str | Path) -> list[int]:
    """Ids of the blocks that expansion added, from the JSON file in the folder, else from its old-style name.

    Raises:
        UserError: neither says which blocks are new.
    """
    folder = Path(folder)
    path = folder / EXPANDED_LAYERS_FILE
    if path.exists():
        try:
            ids = json.loads(path.read_text())["expanded_layers"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f'{path}: expected {{"expanded_layers": [ids]}} ({error})') from None
        return [int(i) for i in ids]
    old_name = re.search(r"_blk_exp-(\d+)-(\d+)$", folder.name)
    if not old_name:
        raise UserError(
            f"--llama_pro_path {folder}: no {EXPANDED_LAYERS_FILE} in it; make it with scripts/block_expansion.py"
        )
    before, after = map(int, old_name.groups())
    return old_layout(before, after)


def old_layout(before: int, after: int) -> list[int]:
    """Where the 2024 script put `after - before` new blocks: one after every `before / new` old ones."""
    every = before // (after - before)
    return [i for i in range(after) if (i + 1) % (every + 1) == 0]


class LlamaPro(Method):
    saves = "model"

    def _new_blocks(self, model):
        ids = expanded_layers(self.config.llama_pro_path)
        blocks = decoder_blocks(model)
        if not ids or max(ids) >= len(blocks) or min(ids) < 0:
            raise UserError(f"--llama_pro_path: expanded layers {ids} do not fit a model of {len(blocks)} blocks")
        paths = list(blocks)
        return {paths[i]: blocks[paths[i]] for i in ids}

    def packed_in_blocks(self, model):
        new = tuple(f"{path}." for path in self._new_blocks(model))
        return [path for path in super().packed_in_blocks(model) if not path.startswith(new)]

    def attach(self, model, *, dtype):
        for block in self._new_blocks(model).values():
            block.requires_grad_(True)
