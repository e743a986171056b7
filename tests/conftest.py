"""Shared fixtures: process groups that live as long as the test session, and tiny models on disk."""

import os
import shutil

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so before any import of one
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def measured_once():
    """What blocks keep is measured for a third of a second by each of thousands of runs: here once of equal models and
    flags. Tests of the measuring itself call it by its own name."""
    from fsdp_utils.memory import recompute
    from fsdp_utils.memory.activations import kinds_of, measure

    known = {}
    places = ("model_name", "dataset", "output_dir", "llama_pro_path", "master_port", "resume", "explicit_flags")

    def measured(model, blocks, config, *, task, **dtypes):
        if "forward" in vars(model):  # a test's own
            return measure(model, blocks, config, task=task, **dtypes)
        flags = {name: value for name, value in vars(config).items() if name not in places}
        shape = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
        asked = repr((type(model), shape, flags, kinds_of(blocks), type(task), dtypes))
        if asked not in known:
            known[asked] = measure(model, blocks, config, task=task, **dtypes)
        return known[asked]

    recompute.lay_out.__kwdefaults__["measure"] = measured


@pytest.fixture(scope="session")
def pair():
    from workers import Workers

    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def trio():
    from workers import Workers

    workers = Workers(3)
    yield workers
    workers.close()


@pytest.fixture(scope="module", autouse=True)
def own_group():
    """A run with --use_cpu_offload starts a process group of one, which would be the next file's too."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny("llama", **config)`: the folder of a tiny model, made once."""
    from tiny import make_model

    made = {}

    def get(family="llama", **config):
        key = (family, *sorted(config.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **config)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A question/answer file of samples whose lengths differ widely."""
    from tiny import make_data

    return make_data(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="session")
def flags(tiny, tiny_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("expanded")

    def expanded(family):
        """A copy of the tiny model whose last block counts as new."""
        folder = root / family
        if not folder.exists():
            shutil.copytree(tiny(family), folder)
            (folder / "expanded_layers.json").write_text('{"expanded_layers": [1]}')
        return folder

    def make(family="llama", **more):
        if "llama_pro" in more.get("train_type", ""):
            more["llama_pro_path"] = expanded(family)
        return dict(model_name=tiny(family), dataset=tiny_data, batch_size=8, **more)

    return make


@pytest.fixture(scope="session")
def one_process():
    """`first_step` in this process, made once for the same flags: most tests compare with the same few."""
    from real_run import first_step

    made = {}

    def get(flags):
        key = tuple(sorted((name, str(value)) for name, value in flags.items()))
        if key not in made:
            made[key] = first_step(flags)
        return made[key]

    return get


@pytest.fixture(scope="session")
def save_run(tmp_path_factory, tiny_data):
    """`save_run(base, train_type)`: folder of a run with changed weights, and the model it had in memory; made once."""
    from real_run import make_config, save_trained

    made = {}

    def save(base, train_type, **flags):
        key = (base, train_type, *sorted(flags.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(train_type) / "run"
            given = dict(model_name=base, train_type=train_type, save_model=True, output_dir=folder, dataset=tiny_data)
            made[key] = folder, save_trained(make_config(**{**given, "lora_rank": 4, **flags}))
        return made[key]

    return save


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """The test starts with an empty cache of `datasets`, without progress bars."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """wandb writes into `tmp_path / "wandb"`. It reads its variables once a process; they are forgotten afterwards."""
    import wandb

    for name, value in dict(MODE="offline", DIR=tmp_path, SILENT="true").items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def export(tmp_path):
    """`export(run, infer_type, **flags)`: the folder that prepare_weights.py writes; no report unless asked for."""

    import prepare_weights
    from fsdp_utils.core.flags import parse

    def make(run, infer_type, *, name="out", **flags):
        given = dict(model=run, save_dir=tmp_path / name, infer_type=infer_type, device="cpu", fidelity_samples=0)
        argv = [f"--{key}={value}" for key, value in {**given, **flags}.items()]
        prepare_weights.main(parse(prepare_weights.ExportConfig, argv, prog="prepare_weights.py"))
        return tmp_path / name

    return make


@pytest.fixture
def interrupt_evaluation(monkeypatch):
    """`interrupt_evaluation(at=4)`: what scores the fourth answer interrupts evaluate.py, once; gives the list of what
    is answered."""
    import evaluate

    def arm(*, at):
        real, answered = evaluate.scored, []

        def scored(question, output, **more):
            answered.append(output.index)
            if len(answered) == at:
                raise KeyboardInterrupt
            return real(question, output, **more)

        monkeypatch.setattr(evaluate, "scored", scored)
        return answered

    return arm


# files of minutes, begun first: a worker that comes to one of them last works alone in the end
LONG = {f"test_{name}.py" for name in ("checkpoints", "endings", "parity", "peer_gather", "tasks", "training")}


def pytest_collection_modifyitems(items):
    """Long files come first. GPU tests run where there is a GPU, and are reported as skipped elsewhere."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture
def hostly():
    """An offloader that needs no GPU: it copies at once, and counts."""

    from fsdp_utils.sharding.offload import InputOffloader

    class Copies(InputOffloader):
        def __init__(self):
            super().__init__()
            self.sent, self.brought, self.awaited = [], [], []

        def _send(self, tensor):
            self.sent.append(tensor.clone(memory_format=torch.preserve_format))
            return self.sent[-1], f"out {len(self.sent)}"

        def _bring(self, host, device):
            self.brought.append(host)
            return host.clone(memory_format=torch.preserve_format), f"back {len(self.brought)}"

        def _wait(self, event):
            self.awaited.append(event)

    return Copies()
