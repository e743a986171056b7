"""The checkpoint reader and the streaming writer against the safetensors library."""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_utils.core.errors import CheckpointError, UserError
from fsdp_utils.core.folders import new_folder, parse_size
from fsdp_utils.core.locks import make_writable
from fsdp_utils.core.safetensors_io import INDEX_NAME, CheckpointReader, StreamingWriter


def make_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(0, 256, (5, 7), dtype=torch.uint8, generator=generator),
        "weight": torch.randn(6, 8, generator=generator),
        "half": torch.randn(9, 3, generator=generator).bfloat16(),
        "float8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
    }


def write(folder, tensors, **options):
    writer = StreamingWriter(folder, {name: (t.dtype, t.shape) for name, t in tensors.items()}, **options)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish()
    return writer


def same_bytes(a, b):
    """Equal as bits, NaN patterns included."""
    bits_a, bits_b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_a, bits_b)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 150, 1])
def test_written_files_are_what_safetensors_reads(tmp_path, max_shard_bytes):
    """The safetensors library and our reader give back every tensor, from one file or many."""
    tensors = make_tensors()
    write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    stock = {}
    for path in tmp_path.glob("*.safetensors"):
        stock |= load_file(path)
    reader = CheckpointReader(tmp_path)
    assert set(stock) == set(reader.names()) == set(tensors)
    assert (tmp_path / INDEX_NAME).exists() == (max_shard_bytes < 10**9)
    for name, tensor in tensors.items():
        assert same_bytes(stock[name], tensor) and same_bytes(reader.tensor(name), tensor)
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert reader.nbytes(name) == tensor.nbytes


def test_shards_stay_below_the_limit(tmp_path):
    """Every shard's data fits max_shard_bytes when each tensor does."""
    tensors = {f"t{i}": torch.zeros(10 + i) for i in range(20)}
    writer = write(tmp_path, tensors, max_shard_bytes=300)
    for shard in set(writer.shard_of.values()):
        assert sum(tensors[name].nbytes for name, where in writer.shard_of.items() if where == shard) <= 300


def test_rows_equal_slices_from_several_threads(tmp_path):
    """Slices read concurrently equal slices of the whole, empty ones included."""
    tensors = {f"t{i}": torch.randn(17, 5) for i in range(8)}
    write(tmp_path, tensors, max_shard_bytes=800)
    reader, wrong = CheckpointReader(tmp_path), []

    def read(start, stop):
        wrong.extend(n for n, t in tensors.items() if not torch.equal(reader.rows(n, start, stop), t[start:stop]))

    threads = [threading.Thread(target=read, args=bounds) for bounds in [(0, 6), (6, 12), (12, 17), (17, 17)] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_of_a_stack(tmp_path):
    """As if its matrices stood below one another, from anywhere to anywhere; the beginning of one matrix."""
    stack, flat = torch.arange(4 * 5 * 3 * 2, dtype=torch.uint8).view(4, 5, 3, 2), torch.arange(12.0).view(3, 4)
    save_file({"stack": stack, "flat": flat}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    for start in range(21):
        for stop in range(start, 21):
            assert same_bytes(reader.stacked_rows("stack", start, stop), stack.flatten(0, 1)[start:stop])
    for count in (1, 6, 7, 100):
        assert torch.equal(reader.beginning("stack", 2, count), stack[2].flatten()[:count])
        assert torch.equal(reader.beginning("flat", 2, count), flat[2][:count])


def test_writer_wants_each_announced_tensor_once(tmp_path):
    """A wrong name, shape or dtype, a second write and a missing tensor are errors that name the tensor."""
    writer = StreamingWriter(tmp_path, {"a": (torch.float32, (2, 3)), "b": (torch.float32, (1,))})
    with pytest.raises(ValueError, match="c: not among"):
        writer.write("c", torch.zeros(1))
    with pytest.raises(ValueError, match=r"a: .* announced"):
        writer.write("a", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"a: .* announced"):
        writer.write("a", torch.zeros(2, 3).half())
    writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="a: written twice"):
        writer.write("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="never written, such as b"):
        writer.finish()


def break_truncate(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def break_header(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:5])


def break_garbage(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes((16).to_bytes(8, "little") + b"x" * 80)


def break_missing(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def break_index(folder):
    (folder / INDEX_NAME).write_text("{}")


def repoint(folder, target):
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["t0"] = target
    (folder / INDEX_NAME).write_text(json.dumps(index))


def break_absolute(folder):
    repoint(folder, str(folder / "model-00001-of-00003.safetensors"))


def break_parent(folder):
    repoint(folder, f"../{folder.name}/model-00001-of-00003.safetensors")


def break_wrong_shard(folder):
    repoint(folder, "model-00003-of-00003.safetensors")


def break_link(folder):
    path = folder / "model-00001-of-00003.safetensors"
    path.unlink()
    path.symlink_to(folder.parent / "gone.safetensors")


def break_choice(folder):
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")


def break_pickled(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").touch()


def break_empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_truncate, "model-00002-of-00003.safetensors: truncated"),
        (break_header, "model-00002-of-00003.safetensors: truncated"),
        (break_garbage, "model-00002-of-00003.safetensors: corrupt"),
        (break_missing, "model-00002-of-00003.safetensors is missing"),
        (break_index, "not a safetensors index"),
        (break_absolute, "outside the folder"),
        (break_parent, "outside the folder"),
        (break_wrong_shard, "puts t0 in model-00003-of-00003.safetensors"),
        (break_link, "a link to what is not there"),
        (break_choice, "t0 is in both model-00001-of-00003.safetensors and model-00002"),
        (break_pickled, "only pickled weights"),
        (break_empty, "no model.safetensors"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, message):
    """Each kind of damage is a CheckpointError that names the file, on one line."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, {f"t{i}": torch.zeros(10) for i in range(3)}, max_shard_bytes=40)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointReader(folder)
    assert "\n" not in str(error.value)


def test_links_are_followed(tmp_path):
    """Caches keep models as folders of links: to files elsewhere, the index among them, or of the folder itself."""
    write(tmp_path, {f"t{i}": torch.full((10,), float(i)) for i in range(3)}, max_shard_bytes=40)
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in tmp_path.glob("model*"):
        (folder / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(CheckpointReader(tmp_path / "link").tensor("t2"), torch.full((10,), 2.0))


def test_of_two_readings_that_of_transformers(tmp_path):
    """One file wins over an index, the file that config.json names over both; a variant is read only if it is named."""
    write(tmp_path, {f"t{i}": torch.zeros(10) for i in range(3)}, max_shard_bytes=40)
    save_file({"single": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"variant": torch.ones(2)}, tmp_path / "model.fp16.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    assert CheckpointReader(tmp_path).names() == ["single"]
    (tmp_path / "model.safetensors").unlink()
    assert set(CheckpointReader(tmp_path).names()) == {"t0", "t1", "t2"}
    (tmp_path / "config.json").write_text('{"transformers_weights": "model.fp16.safetensors"}')
    assert CheckpointReader(tmp_path).names() == ["variant"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "shard-00000-model-00001-of-00001.safetensors").touch()
    with pytest.raises(CheckpointError, match="parts of a distributed checkpoint"):
        CheckpointReader(tmp_path)
    (tmp_path / "shard-00000-model-00001-of-00001.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"only model-00001-of-00003\.safetensors|only model\.fp16"):
        CheckpointReader(tmp_path)


def test_folder_appears_only_when_complete(tmp_path):
    """A failure inside new_folder leaves nothing behind, and files of an earlier run untouched."""
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with new_folder(target) as folder:
        (folder / "first").touch()
    with pytest.raises(UserError, match="--overwrite true"), new_folder(target):
        pass
    with pytest.raises(UserError, match=r"no config\.json, so it is not replaced"), new_folder(target, overwrite=True):
        pass
    with pytest.raises(UserError, match=r"holds .*first, which is read"):
        new_folder(target, overwrite=True, mark="first", sources=[target / "first"]).__enter__()
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True, mark="first"):
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["first"]
    with new_folder(target, overwrite=True, mark="first") as folder:
        (folder / "second").touch()
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_writer_at_a_time(tmp_path):
    """A second writer of a folder is refused and spoils nothing; what a killed one left is no obstacle."""
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "mine").touch()
        with pytest.raises(UserError, match="another process is writing it"), new_folder(target):
            pass
        assert (folder / "mine").exists()
    (tmp_path / ".other.partial" / "deep").mkdir(parents=True)
    with new_folder(tmp_path / "other") as folder:
        assert not list(folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "link") as folder:
        (folder / "there").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "there").exists()
    with pytest.raises(UserError, match=r"--output_dir .*: .*(Not a directory|File exists)"):
        make_writable(tmp_path / "empty" / "there" / "deeper", named="--output_dir x")


def test_sizes():
    """Sizes are powers of ten with an optional unit; anything else is refused."""
    assert [parse_size(text) for text in ("5GB", "200MB", "1.5kb", 1000)] == [5 * 10**9, 2 * 10**8, 1500, 1000]
    for text in ("", "0GB", "-1GB", "five", "5XB"):
        with pytest.raises(ValueError, match="not a size"):
            parse_size(text)
