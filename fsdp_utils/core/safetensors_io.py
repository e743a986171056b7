"""Read slices of, and stream tensors into, folders of safetensors files, at most one tensor in memory."""

import json
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fsdp_utils.core.errors import CheckpointError, UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointReader:
    """Tensors of a safetensors folder by name; files stay mapped, so reads from several threads need no lock.

    Of a folder with several sets of weights it reads what transformers reads.
    Returned tensors may be views of the private file mapping: do not write to them in place.
    Raises CheckpointError for pickled-only weights, a missing, truncated or corrupt shard, an index that points outside
    its folder, names a tensor its shard lacks or leaves open in which shard it is, and for a folder without weights.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        indexed = _shard_of_each_tensor(self.folder)  # tensor name -> file name
        self._headers, self._files, self.shard_of = {}, {}, {}
        for shard in sorted(set(indexed.values())):
            path = _inside(self.folder, shard)
            self._headers[shard] = read_header(path)
            self._files[shard] = _open(path)
            for name in self._headers[shard]:  # transformers takes those that the index forgot, too
                if self.shard_of.setdefault(name, shard) != shard:
                    both = f"{self.shard_of[name]} and {shard}"
                    raise CheckpointError(f"{self.folder}: {name} is in both {both}; remove the index and files of one")
        for name, shard in indexed.items():
            if name not in self._headers[shard]:
                raise CheckpointError(f"{self.folder}: the index puts {name} in {shard}, which does not hold it")
        self.shard_of = indexed | self.shard_of  # in the order of the index

    def names(self):
        return list(self.shard_of)

    def __contains__(self, name):
        return name in self.shard_of

    def shape(self, name):
        return tuple(self._entry(name)["shape"])

    def dtype(self, name):
        dtype = self._entry(name)["dtype"]
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.folder / self.shard_of[name]}: {name} has the unsupported dtype {dtype}")
        return DTYPES[dtype]

    def nbytes(self, name):
        start, stop = self._entry(name)["data_offsets"]
        return stop - start

    def tensor(self, name):
        return self._file(name).get_tensor(name)

    def rows(self, name, start, stop):
        """Rows [start, stop) of dim 0, without reading the others; of a scalar itself."""
        return self._file(name).get_slice(name)[start:stop] if self.shape(name) else self.tensor(name)

    def columns(self, name, start, stop):
        """Columns [start, stop) of a matrix, without reading the others."""
        return self._file(name).get_slice(name)[:, start:stop]

    def stacked_rows(self, name, start, stop):
        """Rows [start, stop) of all matrices `[n, height, ...]`, as if they stood below one another, and no others."""
        whole, height = self._file(name).get_slice(name), self.shape(name)[1]
        edges = [start, *range((start // height + 1) * height, stop, height), stop]  # where matrices end, too
        parts = [whole[a // height, a % height : a % height + b - a] for a, b in pairwise(edges) if a < b]
        return torch.cat(parts) if parts else torch.empty(0, *self.shape(name)[2:], dtype=self.dtype(name))

    def beginning(self, name, row, count):
        """The first numbers of row `row` of dim 0, at most `count`; of a row that is a matrix, the rest is not read."""
        _, *shape = self.shape(name)
        if len(shape) < 2:
            return self.rows(name, row, row + 1).reshape(-1)[:count]
        height = -(-count // max(1, math.prod(shape[1:])))
        return self._file(name).get_slice(name)[row, :height].reshape(-1)[:count]

    def _file(self, name):
        self._entry(name)
        return self._files[self.shard_of[name]]

    def _entry(self, name):
        if name not in self.shard_of:
            raise CheckpointError(f"{self.folder}: no tensor named {name}")
        return self._headers[self.shard_of[name]][name]


def _shard_of_each_tensor(folder):
    name = _weights_of(folder)
    if not name.endswith(".index.json"):
        return dict.fromkeys(read_header(_inside(folder, name)), name)
    try:
        shard_of = json.loads(_inside(folder, name).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / name}: not a safetensors index ({error!r})") from None
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{folder / name}: weight_map must map tensor names to file names")
    if not shard_of:
        raise CheckpointError(f"{folder / name}: weight_map is empty")
    return shard_of


def _weights_of(folder):
    """The file that transformers begins with: the one that config.json names, else the single file, else the index."""
    try:
        named = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        named = None  # no model's folder
    if named:
        return named
    for path in folder.glob("shard-*-model-*.safetensors"):
        way_out = "transformers reads them in place of all others; save the model whole, or remove them"
        raise CheckpointError(f"{folder}: holds parts of a distributed checkpoint ({path.name}): {way_out}")
    for name in (SINGLE_NAME, INDEX_NAME):
        if (folder / name).exists():
            return name
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder}: only pickled weights (.bin), which can run code when read; convert them to safetensors first"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    beside = f", only {others[0]}, which transformers does not read by itself; rename it" if others else ""
    raise CheckpointError(
        f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}{beside}" if folder.is_dir() else f"{folder}: no such folder"
    )


def _inside(folder, name):
    """The path of a shard. An index is untrusted text: no name in it may leave the folder. Links may, as those do by
    which a cache keeps models: they were made by whoever made the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder}: {name} lies outside the folder")
    if not (folder / name).is_file():
        broken = (folder / name).is_symlink()
        raise CheckpointError(f"{folder}: {name} is {'a link to what is not there' if broken else 'missing'}")
    return folder / name


def read_header(path):
    """Tensor name -> {"dtype", "shape", "data_offsets"} of one file, its size checked against the header."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise CheckpointError(f"{path}: truncated or corrupt, {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise CheckpointError(f"{path}: corrupt, its header is not that of a safetensors file") from None
    if size != expected:
        raise CheckpointError(f"{path}: truncated or corrupt, {size} bytes where its header says {expected}")
    return header


def _open(path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: corrupt ({error})") from None


def start_file(path, specs, *, metadata=None):
    """Makes a file of these tensors, name -> (dtype, shape), without values; returns where each begins, in bytes."""
    header, offset = {"__metadata__": {"format": "pt"} if metadata is None else metadata}, 0
    # wide dtypes first: a float32 after an odd number of uint8 would lie unaligned in the mapped file
    for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        stop = offset + _nbytes(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs}


def write_rows(path, rows):
    """Writes rows into a file that `start_file` made: pairs of (name, first row) and a CPU tensor `[n, ...]`.

    Several processes may write rows of one file at once: rows of a tensor lie one after another.
    """
    header, length = read_header(path), int.from_bytes(Path(path).open("rb").read(8), "little")
    with open(path, "r+b") as file:
        for (name, first), tensor in rows:
            begin, end = header[name]["data_offsets"]
            count = max(header[name]["shape"][0], 1) if header[name]["shape"] else 1
            file.seek(8 + length + begin + first * ((end - begin) // count))
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


class StreamingWriter:
    """Writes tensors one at a time, in any order, into shards of at most `max_shard_bytes` (one tensor may exceed it).

    specs: dict of name -> (dtype, shape), all of them known beforehand, because the header comes first in a file.
    Each tensor must be written exactly once; `finish()` checks that, and writes the index if there are several shards.
    Raises UserError if the disk is too small for all of them, before anything is written.
    """

    def __init__(self, path_dir, specs, max_shard_bytes=5 * 10**9, metadata=None):
        self.folder = Path(path_dir)
        self.specs = {name: (dtype, tuple(shape)) for name, (dtype, shape) in specs.items()}
        self.shard_of, self._position, self._pending = {}, {}, set(self.specs)
        refuse_full_disk(self.folder, self.specs)
        shards = _split(self.specs, max_shard_bytes)
        for number, names in enumerate(shards, 1):
            shard = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            of_shard = {name: self.specs[name] for name in names}
            self._position |= start_file(self.folder / shard, of_shard, metadata=metadata)
            self.shard_of |= dict.fromkeys(names, shard)

    def write(self, name, tensor):
        if name not in self._pending:
            raise ValueError(f"{name}: {'written twice' if name in self.specs else 'not among the announced tensors'}")
        if (tensor.dtype, tuple(tensor.shape)) != self.specs[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {self.specs[name]} was announced")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with open(self.folder / self.shard_of[name], "r+b") as file:
            file.seek(self._position[name])
            file.write(data)
        self._pending.remove(name)

    def finish(self):
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors were never written, such as {min(self._pending)}")
        if len(set(self.shard_of.values())) > 1:
            index = {
                "metadata": {"total_size": total_bytes(self.specs)},
                "weight_map": dict(sorted(self.shard_of.items())),
            }
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def total_bytes(specs):
    """What tensors take, of a dict of name -> (dtype, shape)."""
    return sum(_nbytes(*spec) for spec in specs.values())


def refuse_full_disk(folder, specs):
    """Raises UserError if tensors of these specs do not fit on the disk where `folder` is or will be."""
    above = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    total, free = total_bytes(specs), shutil.disk_usage(above).free
    if total > free:
        raise UserError(f"{folder}: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")


def _nbytes(dtype, shape):
    return dtype.itemsize * math.prod(shape)


def _split(specs, max_shard_bytes):
    shards, room = [[]], max_shard_bytes
    for name, spec in specs.items():
        if shards[-1] and _nbytes(*spec) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= _nbytes(*spec)
    return shards
