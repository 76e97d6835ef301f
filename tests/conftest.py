import os
import pathlib
import signal
import sys

# Set before torch is imported, and for child processes, because the last bits of sums depend on it
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
    """Restores the handlers of SIGINT and SIGTERM after each test, because training runs replace them."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path_factory, monkeypatch):
    """Gives each test an empty working folder, because runs such as the default teacher write into runs/."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The checkpoint of a small teacher, which flow.py has trained for 6 steps."""
    from test_training import FLOW, call

    import flow
    out = tmp_path_factory.mktemp("flow") / "run"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, flow, *FLOW, "--steps", 6, "--save-every", 4, "--out", out)
    return out / "ckpt.pt"


@pytest.fixture(autouse=True)
def random_numbers_do_not_depend_on_the_tests_before():
    torch.manual_seed(123)                 # not 0, which is the seed of generators in the tests
