"""--optimizer paged_adamw: refused where there is no GPU; a resumed run's states are pages again."""

import pytest
import torch
from real_run import make_config
from test_checkpoints import RUN, run_train

from fsdp_utils.core.errors import UserError
from fsdp_utils.folders import checkpoints
from fsdp_utils.model.assemble import check_optimizer
from fsdp_utils.training.optim import place_state, stock_optimizer

PAGED = ["paged_adamw", "paged_adamw_8bit"]


@pytest.mark.parametrize("optimizer", PAGED)
def test_paged_states_need_a_gpu(optimizer):
    """With --device cpu the flags tell, with auto the machine does; both in one line with the way out."""
    with pytest.raises(UserError, match=f"--optimizer {optimizer}: .*--device cpu; use adamw_8bit"):
        make_config(optimizer=optimizer)
    with pytest.raises(UserError, match=f"--optimizer {optimizer}: .*there is none; use adamw_8bit"):
        check_optimizer(make_config(optimizer=optimizer, device="auto"), device=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_restored_states_are_pages(monkeypatch):
    """What is read from a checkpoint goes into memory that the optimizer made; numbers and scales do not."""
    config = make_config(optimizer="paged_adamw", device="auto")
    p = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = stock_optimizer(config, [p])
    made = []
    original = optimizer.get_state_buffer
    monkeypatch.setattr(optimizer, "get_state_buffer", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    state = torch.randn(4, 5)
    placed = place_state(optimizer, state, p)
    assert placed is made[0] and torch.equal(placed, state) and placed.dtype == torch.float32
    assert place_state(optimizer, 3, p) == 3 and len(made) == 1
    assert torch.equal(place_state(optimizer, state[0], p), state[0]) and len(made) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", PAGED)
def test_resumed_is_uninterrupted(tiny, flags, tmp_path, optimizer):
    """Bit for bit, and with parameters large enough to be paged."""
    given = flags(train_type="full", optimizer=optimizer) | dict(batch_size=4, device="cuda", max_steps=4)
    given |= dict(model_name=tiny("llama", intermediate_size=4096), precision="bf16", attn_implementation="eager")
    run_train(output_dir=tmp_path / "straight", **given)
    run_train(output_dir=tmp_path / "resumed", stop_at_step=2, **given)
    kept = checkpoints.read_state(tmp_path / "resumed/checkpoints/step-000002")
    assert kept["optimizer_is_split"] is (optimizer == "paged_adamw_8bit") and RUN["save_model"]
    run_train(output_dir=tmp_path / "resumed", resume="auto", **given)
    names = [path.name for path in (tmp_path / "straight").glob("*.safetensors")]
    assert names
    for name in names:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
