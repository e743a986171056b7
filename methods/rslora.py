"""rsLoRA (arXiv:2312.03732): B A is multiplied by `alpha / sqrt(r)`, so that larger ranks do not learn more slowly."""

import math
from typing import ClassVar

from methods.adapter import Scaling


class RankStabilized(Scaling):
    peft_config: ClassVar[dict] = {"use_rslora": True}

    def factor(self, alpha, rank):
        return alpha / math.sqrt(rank)

    def alpha(self, factor, rank):
        return factor * math.sqrt(rank)
