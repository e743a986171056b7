"""--push_to_hub: the login is checked before the work, what is uploaded is whole, a failure loses nothing."""

import huggingface_hub
import pytest
from real_run import make_config
from test_cli import refused

import prepare_weights
import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes what is asked of it, in order."""

    class Hub:
        calls, fails = [], None

        def whoami(self, **given):
            self.calls.append(("whoami", given))
            if self.fails == "whoami":
                raise OSError("401 Client Error\nsecond line")

        def create_repo(self, name, **given):
            self.calls.append(("create_repo", dict(name=name, **given)))

        def upload_folder(self, **given):
            held = sorted(path.relative_to(given["folder_path"]).as_posix() for path in given["folder_path"].rglob("*"))
            self.calls.append(("upload_folder", dict(given, held=held)))
            if self.fails == "upload":
                raise OSError("503 Server Error\nsecond line")

        @property
        def asked(self):
            return [name for name, _ in self.calls]

    made = Hub()
    made.calls = []
    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(made, name))
    return made


def left(call: dict) -> list[str]:
    """The files that are uploaded: huggingface_hub's own reading of the patterns."""
    from huggingface_hub.utils import filter_repo_objects

    return list(filter_repo_objects(call["held"], ignore_patterns=call["ignore_patterns"]))


def flags_of(tiny, tiny_data, out, **more) -> dict:
    given = dict(model_name=tiny(), dataset=tiny_data, train_type="lora", max_steps=2, output_dir=out)
    return given | dict(save_model=True, push_to_hub="org/name") | more


def test_a_run_is_uploaded(tiny, tiny_data, tmp_path, hub):
    """Its result and its card, into a private repository, without checkpoints and what is not whole."""
    out = tmp_path / "run"
    train.main(make_config(**flags_of(tiny, tiny_data, out, save_every_steps=1)))
    (asked, _), (created, made), (uploaded, call) = hub.calls
    assert (asked, created, uploaded) == ("whoami", "create_repo", "upload_folder")
    assert made == dict(name="org/name", exist_ok=True, private=True)
    assert call["repo_id"] == "org/name" and call["folder_path"] == out
    assert any(name.startswith("checkpoints/") for name in call["held"])
    kept = left(call | dict(held=[*call["held"], ".saving/x.safetensors", ".run.json"]))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "run.json"} <= set(kept)
    assert not any(name.startswith((".", "checkpoints")) for name in kept if name != "checkpoints")


def test_an_export_is_uploaded(tiny, save_run, export, hub):
    """After its card is written."""
    run, _ = save_run(tiny(), "bnb_dora")
    folder = export(run, "merged", push_to_hub="org/name")
    assert hub.asked == ["whoami", "create_repo", "upload_folder"]
    assert {"README.md", "config.json", "model.safetensors"} <= set(left(hub.calls[-1][1]))
    assert hub.calls[-1][1]["folder_path"] == folder


def test_nobody_is_logged_in(tiny, tiny_data, save_run, export, tmp_path, hub, monkeypatch):
    """That is one line before a weight is read, and names the way out."""
    run, _ = save_run(tiny(), "bnb_dora")
    hub.fails = "whoami"
    argv = [f"--{name}={value}" for name, value in flags_of(tiny, tiny_data, tmp_path / "run").items()]
    code, said, read = refused([*argv, "--device=cpu", "--use_cpu_offload=false"])
    assert code == 2 and not read and not (tmp_path / "run").exists()
    line = "--push_to_hub org/name: the hub does not know you (401 Client Error); export HF_TOKEN="
    assert said.startswith(f"error: {line}") and said.count("\n") == 1
    monkeypatch.setattr(prepare_weights, "TrainedWeights", None)  # is not reached
    with pytest.raises(UserError, match=r"the hub does not know you \(401 Client Error\)"):
        export(run, "merged", push_to_hub="org/name")
    assert set(hub.asked) == {"whoami"} and not (tmp_path / "out").exists()


def test_an_upload_that_fails(tiny, tiny_data, save_run, export, tmp_path, hub):
    """The run has ended well on disk; the line says that the upload has not, and its command."""
    hub.fails, out = "upload", tmp_path / "run"
    with pytest.raises(UserError) as error:  # which `processes.run` ends with 2
        train.main(make_config(**flags_of(tiny, tiny_data, out)))
    wanted = f"--push_to_hub org/name: failed (503 Server Error); {out} is complete, upload it with: hf upload org/name"
    assert str(error.value).startswith(f"{wanted} {out} . --private --exclude 'checkpoints/*'")
    assert "\n" not in str(error.value)
    assert train.saving.is_finished(out) and (out / "README.md").exists()
    run, _ = save_run(tiny(), "bnb_dora")
    with pytest.raises(UserError, match=r"is complete, upload it with: hf upload org/name"):
        export(run, "merged", push_to_hub="org/name")
    assert (tmp_path / "out" / "config.json").exists()


def test_other_processes_ask_nothing(tiny, save_run, export, hub, monkeypatch):
    """Only process 0 speaks with the hub."""
    monkeypatch.setenv("RANK", "1")
    train.check_upload("org/name")
    train.upload("nowhere", "org/name")
    assert hub.calls == []


def test_flags(tiny, tiny_data, tmp_path, export):
    """A run that saves nothing, and what is no name of a repository, are refused."""
    with pytest.raises(ConfigError, match="--push_to_hub org/name: nothing is saved; add --save_model true"):
        make_config(**flags_of(tiny, tiny_data, tmp_path, save_model=False))
    for name in ("name", "a/b/c", "/tmp/x"):
        with pytest.raises(ConfigError, match=f"--push_to_hub {name}: is no name of a repository; give org/name"):
            make_config(**flags_of(tiny, tiny_data, tmp_path, push_to_hub=name))
        with pytest.raises(ConfigError, match=f"--push_to_hub {name}: is no name"):
            export(tiny(), "merged", push_to_hub=name)
