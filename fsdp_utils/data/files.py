"""Files: what lies on a disk becomes raw rows, each with the place that names it in a message."""

import csv
import gzip
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from fsdp_utils.core.errors import DataError

SCANNED = 2**24  # bytes of a file that are searched for line ends at a time
BLANK = 64  # longest line of white space alone that counts as an empty one
PROBLEM = "\0problem"  # the only key of a row that could not be made from a row of another format
MARK = b"\xef\xbb\xbf"  # some editors begin a UTF-8 file with it


class Row(NamedTuple):
    """One raw row: `where` it stands; its `value`, or the `problem` that keeps it from having one."""

    where: str
    value: object = None
    problem: str | None = None


def one_line(error: BaseException) -> str:
    """Type and message of an error of another library."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of rows: each has a name, a digest of its content, a length and `read`
# ---------------------------------------------------------------------------------------------------------------------


class Lines:
    """JSON values, one on each line of a file that stays on the disk: only places of lines are in memory.

    Args:
        path: the file.
        name: how messages call it.
        digest: of its content.
        noun: what messages count: lines, or rows where the file was made from another one.
    """

    def __init__(self, path: Path, *, name: str, digest: str, noun: str = "line"):
        self.path, self.name, self.digest, self.noun = path, name, digest, noun
        self.starts, self.ends, self.numbers = _line_places(path)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, indices: Sequence[int]) -> list[Row]:
        """The rows at these places."""
        starts, ends, numbers = (of[indices].tolist() for of in (self.starts, self.ends, self.numbers))
        found = []
        with open(self.path, "rb") as file:
            for start, end, number in zip(starts, ends, numbers, strict=True):
                file.seek(start)
                found.append(_parsed(file.read(end - start), where=f"{self.name}, {self.noun} {number}"))
        return found


def _line_places(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and number (from 1) of each line that is not empty, int64."""
    ends, base = [], 0
    with open(path, "rb") as file:
        while chunk := file.read(SCANNED):
            ends.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + base)
            base += len(chunk)
        ends = np.concatenate([*ends, [base]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        full = ends > starts
        for i in np.flatnonzero(full & (ends - starts <= BLANK)):
            file.seek(starts[i])
            full[i] = bool(file.read(ends[i] - starts[i]).removeprefix(MARK).strip())
    return starts[full], ends[full], np.flatnonzero(full) + 1


def _parsed(text: bytes, *, where: str) -> Row:
    try:
        value = json.loads(text.removeprefix(MARK).decode())
    except json.JSONDecodeError as error:
        hint = "; it is one object over several lines: write one a line" if text.strip() == b"{" else ""
        return Row(where, problem=f"malformed JSON ({error.msg} at column {error.colno}){hint}")
    except UnicodeDecodeError:
        return Row(where, problem="malformed JSON: it is not UTF-8; write the file in it")
    except (RecursionError, ValueError) as error:  # as of a number of thousands of digits
        return Row(where, problem=f"malformed JSON ({one_line(error)})")
    return _checked(where, value)


def _checked(where: str, value) -> Row:
    if isinstance(value, dict):
        return Row(where, problem=value[PROBLEM]) if PROBLEM in value else Row(where, value)
    return Row(where, problem=f"a {type(value).__name__}, not an object; write one JSON object a row")


class Records:
    """Rows that are in memory: those of a JSON array."""

    def __init__(self, values: list, *, name: str, digest: str):
        self.values, self.name, self.digest = values, name, digest

    def __len__(self) -> int:
        return len(self.values)

    def read(self, indices: Sequence[int]) -> list[Row]:
        return [_checked(f"{self.name}, row {i + 1}", self.values[i]) for i in indices]


class Table:
    """Rows of a table of Arrow columns. Where a struct lacks a key, Arrow holds null: such nulls are no values."""

    def __init__(self, dataset: Dataset, *, name: str, digest: str):
        self.dataset, self.name, self.digest = dataset.with_format("arrow"), name, digest

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Sequence[int]) -> list[Row]:
        values = self.dataset[list(indices)].to_pylist()
        return [Row(f"{self.name}, row {i + 1}", _present(value)) for i, value in zip(indices, values, strict=True)]


def _present(value):
    """Without the keys that are null, however deep."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where what was read is kept: in the cache of `datasets`.

    Raises:
        DataError: nothing can be written there.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fsdp_utils"
    with writing_cache():
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextmanager
def writing_cache():
    """Says what failed where the cache cannot be written: the data are not to blame."""
    try:
        yield
    except OSError as error:
        place = datasets.config.HF_DATASETS_CACHE
        raise DataError(
            f"the cache of datasets, {place}, cannot be written ({error.strerror or one_line(error)}); "
            "name another folder by the variable HF_DATASETS_CACHE"
        ) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file: the key of everything that is kept of it. Size and time do not tell two files apart."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(name: str, write: Callable[[Path], None]) -> Path:
    """A file of the cache, written if it is not there."""
    path = cache_folder() / name
    if not path.exists():
        partial = path.with_name(f".{os.getpid()}.{name}")
        try:
            with writing_cache():
                write(partial)
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _json_rows(path: Path, *, name: str, digest: str, noun: str = "line"):
    """JSON lines or one JSON array, whatever the file is called."""
    with open(path, "rb") as file:
        if not file.read(1024).removeprefix(MARK).lstrip().startswith(b"["):
            return Lines(path, name=name, digest=digest, noun=noun)
        file.seek(0)
        text = file.read().removeprefix(MARK)
    try:
        return Records(json.loads(text), name=name, digest=digest)
    except json.JSONDecodeError as error:
        place, why = f"line {error.lineno}", f"{error.msg} at column {error.colno}"
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        place, why = "the array", one_line(error)
    raise DataError(f"{name}, {place}: malformed JSON ({why}); correct it")


def _csv_rows(path: Path, *, name: str, digest: str, noun: str = "line"):
    """A table with a header; all its cells are strings. Kept as JSON lines, for quoted cells may hold line ends."""

    def write(to: Path):
        csv.field_size_limit(sys.maxsize)
        with open(path, newline="", encoding="utf-8-sig") as file, open(to, "w") as out:
            for values in _csv_values(csv.reader(file, strict=True), name=name):
                out.write(json.dumps(values) + "\n")

    return Lines(_kept(f"csv-{digest}.jsonl", write), name=name, digest=digest, noun="row")


def _csv_values(reader, *, name: str) -> Iterator[dict]:
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}: its header names a column twice; rename one")
        for cells in reader:
            if cells and len(cells) != len(header):
                yield {PROBLEM: f"{len(cells)} cells, but the header has {len(header)} (line {reader.line_num})"}
            elif cells:
                yield dict(zip(header, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{name}, after line {reader.line_num}: {one_line(error)}; correct the file") from None


def _parquet_rows(path: Path, *, name: str, digest: str, noun: str = "line"):
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read ({one_line(error)}); write the file again") from None
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise DataError(f"{name}: names a column twice; rename one")

    def write(to: Path):
        with pa.OSFile(str(to), "wb") as out, pa.ipc.new_stream(out, file.schema_arrow) as stream:
            for batch in file.iter_batches(batch_size=10_000):
                stream.write_batch(batch)

    kept = str(_kept(f"table-{digest}.arrow", write))
    try:
        return Table(Dataset.from_file(kept), name=name, digest=digest)
    except (ValueError, TypeError, NotImplementedError) as error:  # a type of column that `datasets` does not know
        raise DataError(f"{name}: cannot be read ({one_line(error)}); leave that column away") from None


def _gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path) as file:
        while chunk := file.read(SCANNED):
            yield chunk


def _zstandard(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: takes zstandard, which is not installed; `pip install zstandard`") from None
    part = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as file:
        while chunk := file.read(SCANNED):
            while chunk:
                part = zstandard.ZstdDecompressor().decompressobj() if part.eof else part
                yield part.decompress(chunk)
                chunk = part.unused_data if part.eof else b""
    if not part.eof:  # which its reader of files would not tell
        raise EOFError("the file ends too early")


FORMATS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
PACKED = {".gz": _gzip, ".zst": _zstandard}
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # files about files
SUFFIXES = f"{', '.join(FORMATS)} (these but .parquet also as {' and '.join(PACKED)})"


def suffixes(path: str | Path) -> tuple[str, str]:
    """The suffix that says what a file holds, and that of its packing or ""."""
    path = Path(str(path).lower())
    return (Path(path.stem).suffix, path.suffix) if path.suffix in PACKED else (path.suffix, "")


def is_data_file(path: str | Path) -> bool:
    """Whether a file is called as those that can be read here."""
    return suffixes(path)[0] in FORMATS and Path(path).name not in ABOUT


def read_file(path: Path, *, name: str):
    """The rows of one file.

    Args:
        name: how messages call it.

    Raises:
        DataError: it cannot be read, is of an unknown kind, or has no rows; or the cache cannot be written.
    """
    kind, packing = suffixes(path)
    if kind not in FORMATS:
        raise DataError(f"{name}: unknown kind of file; give {SUFFIXES}, or a folder of such files")
    try:
        digest = file_digest(path)
        if packing:
            packed = path
            path = _kept(f"unpacked-{digest}{kind}", lambda to: _unpack(packed, to, packing=packing, name=name))
            digest = file_digest(path)  # that of the same rows, packed or not
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or one_line(error)})") from None
    rows = FORMATS[kind](path, name=name, digest=digest)
    if not len(rows):
        raise DataError(f"{name}: the file has no rows; give one with at least one global batch")
    return rows


def _unpack(path: Path, to: Path, *, packing: str, name: str) -> None:
    chunks = PACKED[packing](path)
    with open(to, "wb") as out:
        while True:
            try:
                chunk = next(chunks, None)
            except DataError:
                raise
            except Exception as error:  # gzip, zlib and zstandard each raise their own
                raise DataError(f"{name}: cannot be unpacked ({one_line(error)}); write it again") from None
            if chunk is None:
                return
            out.write(chunk)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: Path, *, choose: Callable[[list[str]], str]) -> Table:
    """The rows of a folder that `save_to_disk` wrote.

    Args:
        choose: which split, of a folder that has several.

    Raises:
        DataError: it cannot be read.
    """
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise many types for broken files
        raise DataError(f"{folder}: cannot be read ({one_line(error)}); save the dataset again") from None
    if not isinstance(loaded, Dataset):
        split = choose(list(loaded))
        folder, loaded = folder / split, loaded[split]
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name} {file_digest(path)}".encode())
    return Table(loaded, name=str(folder), digest=digest.hexdigest())
