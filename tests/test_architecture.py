"""docs/architecture.md: it names every file, and its examples run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, clean_environment

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
BLOCK = re.compile(r"```python\n# (rows?) of (\S+)\n(.*?)```|```python\n# (\S+)\n(.*?)```", re.DOTALL)


def test_every_file_is_named():
    """A file that the tree does not show, or shows though it is gone, is found here."""
    tree = PAGE[PAGE.index("## The tree") : PAGE.index("## Journeys")]
    shown, room = set(), None
    for line in tree.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            room = Path(cells[0].strip("`"))
        if len(cells) == 3 and room:
            named = [Path(name) for name in re.findall(r"`([\w/]+\.py)`", cells[1])]
            shown |= {Path("fsdp_utils") / name if "in `fsdp_utils/`" in cells[1] else room / name for name in named}
    shown = {path if path.parts[0] in ("methods", "fsdp_utils") else Path("fsdp_utils") / path for path in shown}
    there = {p.relative_to(REPOSITORY) for room in ("fsdp_utils", "methods") for p in (REPOSITORY / room).rglob("*.py")}
    documented = {
        "methods/__init__.py",
        "fsdp_utils/export/__init__.py",
        "fsdp_utils/tasks/__init__.py",
    }  # the other packages' are one line
    there -= {p for p in there if p.name == "__init__.py" and str(p) not in documented}
    assert shown == there


def examples() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Files by path, and rows with the module that they belong to."""
    files, rows = {}, []
    for _, table, row, path, code in BLOCK.findall(PAGE):
        if path:
            files[path] = code
        else:
            rows.append((table.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."), row))
    return files, rows


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """`house(script)` runs Python where the examples stand in their packages and tables; what it printed last."""
    folder = tmp_path_factory.mktemp("house")
    files, rows = examples()
    assert len(files) == 4 and len(rows) == 3
    start = ["import importlib, json, sys"]
    for path, code in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(code)
        package = ".".join(Path(path).parts[:-1])
        # extends the package by the folder of the example, before anything has read the tables
        start.append(f"importlib.import_module({package!r}).__path__.append({str((folder / path).parent)!r})")
    for module, row in rows:
        start.append(f"exec({row!r}, vars(importlib.import_module({module!r})))")

    def run(script: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join([*start, script])],
            capture_output=True, text=True, cwd=REPOSITORY, timeout=240,
            env=clean_environment(PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


TRAIN = """
import torch, train, prepare_weights
from pathlib import Path
from safetensors.torch import load_file
from commands import losses
from fsdp_utils.core.flags import parse
from prepare_weights import ExportConfig
from real_run import make_config, prepared, batches_of, plan
from transformers import AutoModelForCausalLM

base, data, out = {base!r}, {data!r}, Path({out!r})
found = {{}}
for name in ("int8_dora", "bnb_norms"):
    flags = dict(model_name=base, dataset=data, train_type=name, lr=0.02, batch_size=4, max_steps=8, log_to="stdout")
    train.main(make_config(**flags, save_model=True, output_dir=out / name))
    found[name] = losses(out / name)

# the example's codes are a quantization: nearer than 4 bits, and packed
error = lambda name: (prepared(make_config(model_name=base, train_type=name)).model.eval()(torch.arange(8)[None]).logits
    - AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(torch.arange(8)[None]).logits).norm().item()
found["error"] = [error("int8_dora"), error("bnb_dora")]

# only the norms have moved
saved, before = load_file(out / "bnb_norms/model.safetensors"), AutoModelForCausalLM.from_pretrained(base).state_dict()
moved = {{name for name, tensor in saved.items() if tensor.dim() == 1 and not torch.equal(tensor, before[name])}}
found["moved"] = sorted({{name.split(".")[-2] for name in moved}})

# another task: the same model, another loss
from fsdp_utils.tasks.smooth import SmoothLM
from fsdp_utils.training.step import TrainStep
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
losses_of = []
for task in (CAUSAL_LM, SmoothLM()):
    config = make_config(model_name=base, dataset=data, train_type="custom_lora", batch_size=4)
    run = prepared(config)
    step = TrainStep(run, config, task=task)
    losses_of.append([step(batch, lr=0.01).loss for batch in batches_of(config, run).first(6)])
found["tasks"] = losses_of

flags = dict(model=out / "int8_dora", save_dir=out / "halves", infer_type="merged_fp16")
flags |= dict(device="cpu", fidelity_samples=0)
prepare_weights.main(parse(ExportConfig, [f"--{{k}}={{v}}" for k, v in flags.items()], prog="prepare_weights.py"))
found["dtype"] = str(AutoModelForCausalLM.from_pretrained(out / "halves").dtype)
print(json.dumps(found))
"""


def test_the_examples_run(house, tiny, tiny_data, tmp_path):
    """Each added piece trains, saves or exports through the real scripts, with nothing else changed."""
    found = house(TRAIN.format(base=str(tiny()), data=str(tiny_data), out=str(tmp_path)))
    for name in ("int8_dora", "bnb_norms"):
        assert len(found[name]) == 8 and found[name][-1] < found[name][0]
    eight, four = found["error"]
    assert 0 < eight < four / 4
    assert found["moved"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    plain, smooth = found["tasks"]
    assert smooth[-1] < smooth[0] and plain[0] != smooth[0]
    assert found["dtype"] == "torch.float16"
