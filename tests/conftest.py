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
def random_numbers_do_not_depend_on_the_tests_before():
    torch.manual_seed(123)                 # 0 is what the tests' own generators begin with
