"""What a run tells of itself while it runs: speed, time left, MFU, and where the numbers go."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from real_run import batches_of, make_config, prepared, task_in
from test_training import run, run_compiled
from torch.utils.flop_counter import FlopCounterMode

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError, as_dict
from fsdp_utils.folders import opening
from fsdp_utils.training import flops, metrics, sinks
from fsdp_utils.training.clock import Clock
from fsdp_utils.training.step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture
def flags(tiny, tiny_data, tmp_path):
    def make(folder="out", **more):
        given = dict(model_name=tiny(), dataset=tiny_data, output_dir=tmp_path / folder)
        return given | dict(lr=0.01, batch_size=4, train_type="custom_qlora") | more

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch):
    """`ticking(*seconds)`: what the clock reads, one reading after another."""

    def arm(*readings):
        left = iter(readings)
        monkeypatch.setattr("fsdp_utils.training.clock.time.perf_counter", lambda: next(left))

    return arm


BATCH = [dict(input_ids=torch.zeros(2, 50))]


def test_the_clock_leaves_out_what_compiles(ticking):
    """The first step and one that compiles count neither in the speed nor in the time left; what lies between steps
    counts in the time left alone."""
    # begun; of each step its end, and the end of what follows it
    ticking(0, 9, 9, 10, 12, 19, 19, 21, 21)
    clock, rows = Clock(CPU, steps=10), []
    for number, batches in enumerate(clock.timed([BATCH] * 4)):
        rows.append(clock.step(batches, compiled=number == 2))
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([100 / 9, 100, 100 / 7, 50])
    assert [row.get("compiled", False) for row in rows] == [False, False, True, False]
    # steps of 1 and 2 seconds, and 2 after the first of them
    left = [row.get("seconds_left") for row in rows]
    assert left[0] is None and left[1:] == pytest.approx([8 * 1, 7 * 3, 6 * 5 / 2])
    said = clock.said(1.5)
    assert said == "tokens/s: 67 (67 per process), peak 1.50 GiB; 1 of 4 steps compiled and do not count"


def test_a_run_of_one_step_has_no_speed(flags, capsys):
    """It is said, where it once was 0."""
    rows, _ = run(flags(max_steps=1))
    assert "tokens/s: not measured, as the first step" in capsys.readouterr().out
    assert "seconds_left" not in rows[0] and "compiled" not in rows[0]


def test_steps_that_compile_are_marked(flags, tiny, capsys):
    """Shapes that are new at later steps compile there; the same ones do not again."""
    flags = partial(flags, model_name=tiny(num_hidden_layers=1))
    rows = run_compiled(flags(batch_size=1, max_steps=5))
    marked = [row["step"] for row in rows if row.get("compiled")]
    assert marked[0] == 1 and len(marked) > 1  # samples are of many lengths
    said = capsys.readouterr().out
    assert said.count("compiling blocks: the first step takes up to half a minute") == 1
    assert f"{len(marked)} of 5 steps compiled and do not count" in said
    again = run_compiled(flags("again", batch_size=15, max_steps=3))  # all samples, again and again
    assert [row.get("compiled") for row in again] == [True, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# MFU
# ---------------------------------------------------------------------------------------------------------------------


def counted(config) -> tuple[float, float, float]:
    """FLOPs of a step: torch's count of what is run, ours of the model, and of what is recomputed. Whole logits are of
    all tokens."""
    ready = prepared(config)
    step = TrainStep(ready, config, task=task_in(config))
    (micro_batches,) = step.batches(batches_of(config, ready)).first(1)
    with FlopCounterMode(display=False) as counter:
        step.backward(micro_batches)
    step.close()
    (batch,), blocks = micro_batches, list(ready.blocks.values())
    again = flops.recomputed_cost(ready.model, blocks[: ready.recomputed], config)
    model = flops.model_cost(ready.model, blocks)
    model = model._replace(token=model.token + model.predicting, predicting=0)
    return counter.get_total_flops(), model.of(batch, causal=False), again.of(batch, causal=False)


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_flops_are_those_that_run(flags, tiny, train_type):
    """torch counts the same, with checkpointing and without, but for what need not be run: the gradient of the first
    block's input where nothing below it trains, and the down projection a second time. Eager attention computes all
    pairs."""
    given = flags(train_type=train_type, fused_loss=False, model_name=tiny(num_hidden_layers=6), batch_size=8)
    given |= dict(attn_implementation="eager")
    torchs, ours, again = counted(make_config(**given, use_gradient_checkpointing=False))
    assert again == 0
    assert ours == pytest.approx(torchs, rel=1e-9 if train_type == "full" else 0.03)
    torchs, ours, again = counted(make_config(**given))
    assert ours + again == pytest.approx(torchs, rel=0.05)
    assert again > ours / 5


def test_packed_samples_attend_to_themselves(flags):
    """A pack costs the pairs of its samples, each token with those up to itself."""
    config = make_config(**flags(packing=True, batch_size=2))
    ready = prepared(config)
    (batch,) = next(batches_of(config, ready).first(1))
    positions = batch["position_ids"]
    assert flops.pairs_in(batch, causal=True) == sum(int(p) + 1 for p in positions.flatten())
    padded = dict(input_ids=torch.zeros(3, 7))
    assert flops.pairs_in(padded, causal=True) == 3 * 28 and flops.pairs_in(padded, causal=False) == 3 * 49


def test_policies_recompute_less(flags):
    """What a policy keeps is not counted again."""
    costs = []
    for policy in ("full", "narrow", "products"):
        config = make_config(**flags(checkpoint_policy=policy))
        ready = prepared(config)
        costs.append(flops.recomputed_cost(ready.model, list(ready.blocks.values()), config))
    assert costs[0].token > costs[1].token > costs[2].token > 0  # adapters are computed again
    assert costs[0].pair > 0 == costs[1].pair == costs[2].pair


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA RTX A1000", None)],
)  # fmt: skip
def test_peaks(name, peak):
    """By what the driver calls the card."""
    assert flops.peak_of(name) == peak


def test_mfu_is_logged(flags, monkeypatch, capsys):
    """On a card that is known: its share of the peak, of the model and of all that is multiplied."""
    monkeypatch.setattr(flops, "device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr("fsdp_utils.folders.opening.device_name", lambda device: "NVIDIA L4")
    rows, _ = run(flags(max_steps=3))
    assert all(0 < row["mfu"] < row["hfu"] < 1e-2 for row in rows)
    said = capsys.readouterr().out
    assert "device: NVIDIA L4; MFU is of 121 TFLOP/s" in said and ", MFU 0.0%, peak" in said


# ---------------------------------------------------------------------------------------------------------------------
# The start
# ---------------------------------------------------------------------------------------------------------------------


def test_the_start_of_a_run(flags, capsys):
    """One block: model, method, what trains, the batch, the plan of memory, the device, what will be kept."""
    run(flags(max_steps=2, save_model=True, save_every_steps=2))
    said = capsys.readouterr().out.splitlines()
    names = ["model: ", "method: custom_qlora", "trainable params: ", "trained: ", "frozen base: ",
             "global batch: 4 rows", "memory plan, GiB in each process: base 0.0",
             "device: cpu; no MFU: the peak of cpu is not known", "keeps in "]  # fmt: skip
    first = next(i for i, line in enumerate(said) if line.startswith("model: "))
    block = said[first : first + len(names)]
    assert all(line.startswith(name) for line, name in zip(block, names, strict=True)), block
    assert block[-1].endswith(": the adapter, checkpoints every 2 steps, the newest 2, metrics.jsonl, report.html")


# ---------------------------------------------------------------------------------------------------------------------
# Where numbers go
# ---------------------------------------------------------------------------------------------------------------------


def test_several_sinks(flags, monkeypatch, capsys):
    """Each shows every step, by its name once; a bar is drawn where nothing else is on the terminal."""
    run(flags(log_to="stdout, tqdm,stdout", max_steps=2))
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines() if line.startswith("step=")] == ["step=1", "step=2"]
    assert "2/2" in shown.err and "left 00:00" in shown.err
    monkeypatch.setattr(sinks, "load_class", lambda target: sinks.Stdout)
    made = sinks.make(make_config(**flags(log_to="tensorboard")), total=1, start=0, run_ids={})
    assert list(made) == ["tqdm", "tensorboard"]


def test_a_sink_that_is_not_known():
    """Said with the one that is meant, before anything is imported."""
    with pytest.raises(ConfigError, match=r"^--log_to wandbb: did you mean wandb\? choose from tqdm, stdout, wandb, "):
        make_config(log_to="tqdm,wandbb")
    assert make_config(log_to="trackio,mlflow", group="a", entity="b").notes() == [
        "--entity has no effect: --log_to is trackio,mlflow"
    ]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow"])
def test_a_sink_that_is_not_installed(monkeypatch, name):
    """Said before any weight is read, with what installs it."""
    monkeypatch.setattr(sinks, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"^--log_to {name}: {name} is not installed; pip install {name}$"):
        metrics.check_sink(make_config(log_to=name))


def in_tensorboard(folder) -> dict[str, list]:
    """Curves of an event folder: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(flags, tmp_path):
    """Its files hold the numbers of metrics.jsonl, and a resumed run goes on in them without telling a step twice."""
    pytest.importorskip("tensorboard")
    given = flags(log_to="tensorboard", eval_samples=2, num_epochs=3, batch_size=2, save_every_steps=2)
    with pytest.raises(RuntimeError, match="power"):
        run(given | dict(max_steps=6), StepInBackward=None, _end=Failing(at=4))
    rows, _ = run(given | dict(max_steps=6, resume="auto"))
    found = in_tensorboard(tmp_path / "out")
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert found["loss"] == [(step, pytest.approx(loss)) for step, loss in losses] and len(losses) == 6
    assert found["eval_loss"] == [(6, pytest.approx(rows[-1]["eval_loss"]))]
    run(given | dict(max_steps=1, overwrite=True))  # a new run forgets the old one's
    assert len(in_tensorboard(tmp_path / "out")["loss"]) == 1
    run(flags("out", max_steps=1, overwrite=True))  # and its folder is no foreign file


class Failing:
    """Stands for TrainStep._end: the power fails at a step."""

    def __init__(self, at):
        self.left, self.real = at, TrainStep._end

    def __get__(self, step, owner):
        self.left -= 1
        if not self.left:
            raise RuntimeError("power")
        return partial(self.real, step)


def test_trackio(flags, tmp_path, monkeypatch):
    """The numbers of metrics.jsonl, in one run before and after a resume."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    given = flags(log_to="trackio", project_name="trial", save_every_steps=2, num_epochs=3)
    with pytest.raises(RuntimeError, match="power"):
        run(given | dict(max_steps=4), _end=Failing(at=4))
    rows, _ = run(given | dict(max_steps=4, resume="auto"))
    (name,) = SQLiteStorage.get_runs("trial")
    told = {row["step"]: row["loss"] for row in SQLiteStorage.get_logs("trial", name)}
    assert told == {row["step"]: row["loss"] for row in rows}


def test_mlflow(flags, tmp_path, monkeypatch):
    """The numbers of metrics.jsonl and every flag, in one run before and after a resume."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    given = flags(log_to="mlflow", project_name="trial", save_every_steps=2, num_epochs=3)
    with pytest.raises(RuntimeError, match="power"):
        run(given | dict(max_steps=4), _end=Failing(at=4))
    mlflow.end_run()
    rows, _ = run(given | dict(max_steps=4, resume="auto"))
    client = mlflow.MlflowClient()
    (told,) = client.search_runs([mlflow.get_experiment_by_name("trial").experiment_id])
    losses = {point.step: point.value for point in client.get_metric_history(told.info.run_id, "loss")}
    assert losses == {row["step"]: row["loss"] for row in rows}
    assert told.data.params["train_type"] == "custom_qlora"
    assert set(told.data.params) == set(as_dict(make_config()))


def test_mlflow_does_not_answer(monkeypatch):
    """Said before any weight is read, with the way out."""
    mlflow = pytest.importorskip("mlflow")

    def away(**_):
        raise mlflow.MlflowException("no route\nto host")

    monkeypatch.setattr(mlflow, "search_experiments", away)
    with pytest.raises(UserError, match=r"--log_to mlflow: no route; .* or set MLFLOW_TRACKING_URI to a server"):
        metrics.check_sink(make_config(log_to="mlflow"))


def test_a_tracker_that_fails_ends_no_run(flags, monkeypatch, capsys):
    """It is said once, and every step is asked again."""
    asked = []

    class Away(sinks.Tracker):
        def send(self, row):
            asked.append(row["step"])
            raise OSError("no route to host")

    monkeypatch.setattr(sinks, "load_class", lambda target: Away if target.endswith("Trackio") else sinks.Stdout)
    monkeypatch.setattr(sinks, "find_spec", lambda package: True)
    rows, _ = run(flags(log_to="trackio", max_steps=3))
    assert asked == [1, 2, 3] and len(rows) == 3
    assert capsys.readouterr().out.count("WARNING: Away did not take a step (no route to host)") == 1


def test_what_can_be_drawn():
    """Ends of intervals by themselves, no step, nothing infinite."""
    row = dict(step=3, loss=1.5, grad_norm=math.inf, eval_accuracy_interval=(0.25, 0.75), compiled=True)
    assert sinks.numbers(row) == {
        "loss": 1.5, "eval_accuracy_interval_low": 0.25, "eval_accuracy_interval_high": 0.75, "compiled": 1.0
    }  # fmt: skip


def test_the_plan_is_compared_at_the_end(monkeypatch):
    """On a GPU the last lines have the planned peak beside the measured one; on a CPU there is none of the GPU's."""
    clock = SimpleNamespace(said=lambda peak: f"peak {peak}")
    run = SimpleNamespace(device=torch.device("cuda"), sizes=dict(base=GIB, activations=GIB))
    monkeypatch.setattr(opening, "peak_memory_gib", lambda device: 1.6)
    assert opening.closing(run, clock) == ["peak 1.6", "memory: planned 2.00 GiB, measured 1.60 (+25.0%)"]
    run.device = torch.device("cpu")
    assert opening.closing(run, clock) == ["peak 1.6"]
