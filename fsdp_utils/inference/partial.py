"""What an evaluation has answered so far, kept on disk so that an interrupted one goes on where it stopped."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.locks import exclusively
from fsdp_utils.core.ranks import rank


class Partial:
    """Answers so far, one JSON line each, beside the output file; every process appends to a file of its own.

    Processes must see the same file system.
    """

    def __init__(self, output: Path, *, key: str):
        self.output, self.key = output, key
        self.main = output.with_name(f"{output.name}.partial")

    def _files(self) -> list[Path]:
        """Process 0's file, then the others'."""
        return [self.main, *sorted(p for p in self.main.parent.iterdir() if p.stem == self.main.name)]

    def claimed(self):
        """Keeps other evaluations away from the output file until the block ends. For process 0."""
        return exclusively(self.main, named=f"--output_file {self.output}")

    def resume(self, *, overwrite: bool) -> None:
        """Joins what an interrupted evaluation left behind into one file. Only process 0 may call it.

        Raises:
            UserError: it had other settings.
        """
        rows = [] if overwrite else self._lines()
        if any(row["key"] != self.key for row in rows):
            raise UserError(
                f"{self.main}: left by an interrupted evaluation with other settings, data or weights; "
                "pass --overwrite true to forget it, or choose another --output_file"
            )
        joined = self.main.with_name(f".{self.main.name}")
        joined.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(joined, self.main)
        for path in self._files()[1:]:
            path.unlink()

    def _lines(self) -> list[dict]:
        """Every complete line of every process."""
        lines = [line for path in self._files() if path.exists() for line in path.read_text().splitlines()]
        return [line for line in map(_complete, lines) if line]

    def rows(self) -> list[dict]:
        """The answers of this evaluation, whatever another may have written beside them."""
        found = {row["index"]: row for row in self._lines() if row["key"] == self.key}
        return list(found.values())

    def done(self) -> set[int]:
        """Indices of the questions that are answered."""
        return {row["index"] for row in self.rows()}

    @contextmanager
    def appending(self):
        """A function that appends a row to this process's file."""
        path = self.main if rank() == 0 else self.main.with_name(f"{self.main.name}.{rank()}")
        with open(path, "a", buffering=1) as file:
            yield lambda row: file.write(json.dumps(dict(key=self.key, **row)) + "\n")

    def remove(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)


def _complete(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:  # the process was killed while it wrote this line
        return None
