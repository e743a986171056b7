"""One page of one run, or of several over one another: curves, speed, memory, sample answers, flags.

    python scripts/report.py output/demo
    python scripts/report.py output/qlora output/qdora --output compared.html
    python scripts/report.py output/demo --evaluation evaluation.json

The page needs nothing else and no network. Its curves are written as PNGs beside it where matplotlib is installed. A
run writes a page of its own, report.html in its --output_dir, when it ends.
"""

import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse_or_fail
from fsdp_utils.core.folders import REPORT_FILE, refuse_file_above
from fsdp_utils.core.ranks import fail
from fsdp_utils.report import png
from fsdp_utils.report.answers import evaluations_of
from fsdp_utils.report.page import refuse_no_page, write
from fsdp_utils.report.runs import read_runs


@dataclass
class Report:
    output: str | None = flag(None, "the page; not given: report.html in the folder of a run, of several in this one")
    evaluation: str | None = flag(None, "files that evaluate.py wrote, by comma; not given: RUN/evaluation*.json")

    explicit_flags: frozenset = field(default=frozenset(), init=False, repr=False)

    def errors(self):
        return []


def main(folders: list[str], config: Report) -> None:
    """Raises UserError: nothing is named, or what is named is no run or evaluation."""
    if not folders:
        raise UserError("RUN: no run is named; give the --output_dir of one, before the flags")
    output = Path(config.output or (Path(folders[0]) if len(folders) == 1 else Path()) / REPORT_FILE)
    refuse_file_above(output, flag="output")
    refuse_no_page(output)
    runs = read_runs(folders)
    evaluations = evaluations_of(runs, [name.strip() for name in (config.evaluation or "").split(",") if name.strip()])
    output.parent.mkdir(parents=True, exist_ok=True)
    write(output, runs, evaluations)
    print(f"written to {output}")
    pictures = png.write(output, runs)
    print(f"{len(pictures)} pictures beside it" if pictures else "no PNGs: matplotlib is not installed; pip install it")


if __name__ == "__main__":
    named = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    flags = dict(prog="report.py RUN [RUN ...]", description=__doc__)
    try:
        main(named, parse_or_fail(Report, argv=sys.argv[1 + len(named) :], **flags))
    except UserError as error:
        fail(error)
