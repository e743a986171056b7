"""A finished folder goes to the hub."""

from pathlib import Path

from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.core.ranks import is_main, say
from fsdp_utils.folders.names import CHECKPOINTS

# what a run leaves beside its result: checkpoints, and files that were not whole when a process was killed
LEFT_OUT = [f"{CHECKPOINTS}/*", ".*", "*.partial", "*.lock"]


def check_upload(name: str | None) -> None:
    """Raises UserError, on process 0, if nobody is logged in who could upload to `--push_to_hub`: known now, not after
    hours."""
    if not name or not is_main():
        return
    from huggingface_hub import whoami

    try:
        whoami()  # with HF_TOKEN, or what `hf auth login` stored
    except Exception as error:  # no token, a wrong one, no network: each has a type of its own
        way_out = "export HF_TOKEN=…, with a token that may write, or run `hf auth login`"
        raise UserError(f"--push_to_hub {name}: the hub does not know you ({first_line(error)}); {way_out}") from None


def upload(folder: Path, name: str | None) -> None:
    """Puts a folder into the private repository `name`, which is made if there is none. Process 0 does.

    Raises:
        UserError: it failed; the folder is complete, and the message ends with the command that uploads it.
    """
    if not name or not is_main():
        return
    from huggingface_hub import create_repo, upload_folder

    say(f"uploading {folder} to {name}")
    try:
        create_repo(name, exist_ok=True, private=True)
        upload_folder(repo_id=name, folder_path=folder, ignore_patterns=LEFT_OUT)
    except Exception as error:  # as in `check_upload`
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in LEFT_OUT)
        command = f"hf upload {name} {folder} . --private {excluded}"
        raise UserError(
            f"--push_to_hub {name}: failed ({first_line(error)}); {folder} is complete, upload it with: {command}"
        ) from None
    say(f"uploaded to {name}")
