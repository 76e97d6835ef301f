import os
import pathlib
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch, and for child processes: sums depend on it to the last bit

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")
    config.addinivalue_line("markers", "large: needs 6 GB of memory; runs if asked for by pytest -m large")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "large" in item.keywords and "large" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="needs 6 GB; pytest -m large"))
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def signals_are_as_before():
    """A training run takes SIGINT and SIGTERM; the test after it has them as pytest has."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path_factory, monkeypatch):
    """Runs write into runs/ of the working folder, such as the default teacher."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The checkpoint of a small teacher: 6 steps of flow.py."""
    from test_training import FLOW, call

    import flow
    out = tmp_path_factory.mktemp("flow") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, flow, *FLOW, "--steps", 6, "--save-every", 4, "--out", out)
    return out / "ckpt.pt"


@pytest.fixture(autouse=True)
def random_numbers_do_not_depend_on_the_tests_before():
    torch.manual_seed(123)                 # 0 is what the tests' own generators begin with
