"""compressed-tensors' 4-bit weights with the adapter beside them: what training changed is not rounded to 4 bits."""

from fsdp_utils.core.errors import UserError
from fsdp_utils.export.formats import write_adapter
from fsdp_utils.export.gptq import Rounded, round_together
from fsdp_utils.export.w4a16 import W4A16
from methods.adapter import Pair
from methods.closest import closest


class W4A16DoRA(W4A16):
    """A LoRA or DoRA run, DoRA's row factors c folded into both parts: y = (c W) x + s (c B) A x.

    c W is rounded. Calibrated, the adapter is not that of the run but the one of its rank which makes up best for both
    the rounding and what was learned. It goes into the subfolder `adapter/`.
    """

    packs_experts = False  # their adapters would have to stand beside them

    def __init__(self, trained, options):
        super().__init__(trained, options)
        if trained.run.kind != "adapter":
            raise UserError(
                f"--infer_type w4a16_dora: {trained.run.folder} ({trained.run.kind}) has no adapter; use w4a16"
            )
        if trained.folded:
            raise UserError(f"--infer_type w4a16_dora: {trained.run.folder} has its adapter in the base; use w4a16")
        self._pairs: dict[str, Pair] = {}

    def solve(self, path, hessian):
        if path not in self.trained.adapted():
            return super().solve(path, hessian)
        a, b = self.trained.low_rank(path)
        learned = Pair(
            a.float(), b.float() * (self.trained.method.scaling * self.trained.row_factor(path).unsqueeze(1))
        )
        whole = self.trained.merged(path)
        base = whole - learned.b @ learned.a
        grid = self.grid(path, base, None if hessian is None else hessian.diagonal())
        if hessian is None:
            return Rounded(base, grid, learned)
        values = round_together(base, grid, hessian)
        return Rounded(values, grid, closest(whole - values, hessian, rank=len(a)))

    def rounded(self, path):
        found = super().rounded(path)
        if found.low_rank:
            a, b = found.low_rank
            self._pairs[path] = Pair(a.cpu(), b.cpu() / self.trained.method.scaling)
        return found

    def finish(self, folder, *, target):
        write_adapter(self.trained, self._pairs, folder, target=target)
