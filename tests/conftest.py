"""Shared fixtures: process groups that live as long as the test session, and tiny models on disk."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)


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


def pytest_collection_modifyitems(items):
    """GPU tests run where there is a GPU, and are reported as skipped elsewhere."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
