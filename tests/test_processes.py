"""Tests of processes and folders on clusters: left-over variables, file systems without locks, and ports in use."""

import errno
import socket

import pytest
import torch
from test_training import FLOW, call, popen, refused

import flow
from common import checkpoints, folders, processes, torchrun
from common.messages import fail, say_once


@pytest.mark.parametrize("left_over", [dict(LOCAL_RANK="1"), dict(LOCAL_RANK="-1"), dict(RANK="3"), dict(WORLD_SIZE="8"),
                                       dict(WORLD_SIZE=""), dict(LOCAL_RANK="1", WORLD_SIZE="2"), dict(MASTER_ADDR="host", RANK="1")], ids=str)
def test_one_variable_of_torchrun_alone_means_nothing(tmp_path, monkeypatch, capsys, left_over):
    """The run consists of one process, which prints its errors."""
    for name in torchrun.NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert processes.start("cpu") == (torch.device("cpu"), 0, 1)
    assert "--device gpu" in refused(monkeypatch, capsys, flow, *FLOW, "--device", "gpu", "--out", tmp_path / "run")
    call(monkeypatch, flow, *FLOW, "--steps", 1, "--out", tmp_path / "run")
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 1


def test_one_process_of_a_machine_speaks(monkeypatch, capsys):
    for local, lines in (("0", 1), ("1", 0)):
        for name in torchrun.NAMES:
            monkeypatch.setenv(name, local if "RANK" in name else "2")
        with pytest.raises(SystemExit):
            fail("once")
        assert capsys.readouterr().err.count("error: once") == lines
        with pytest.raises(SystemExit):
            fail("always", always=True)
        assert capsys.readouterr().err.count("error: always") == 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_said_once_and_the_run_continues(tmp_path, monkeypatch, capsys, number):
    """Lustre and some NFS file systems do not support locks."""
    fcntl = pytest.importorskip("fcntl")

    def no_locks(file, operation):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    say_once.cache_clear()
    call(monkeypatch, flow, *FLOW, "--steps", 1, "--out", tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path}/run is on a file system without locks (no locks here)") == 1
    assert checkpoints.read(tmp_path / "run/ckpt.pt")["step"] == 1 and not (tmp_path / "run/.owner").exists()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=errno.errorcode.get)
def test_a_lock_that_another_program_holds_is_respected(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def held(file, operation):
        raise OSError(number, "held")

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(ValueError, match="belongs to a running program"):
        folders.own(tmp_path / "run")


def test_a_refused_run_leaves_no_folder_behind(tmp_path, monkeypatch, capsys):
    """The run removes the folders that it created, and keeps those that existed before."""
    (tmp_path / "mine").mkdir()
    refused(monkeypatch, capsys, flow, *FLOW, "--resolution", 15, "--out", tmp_path / "mine/a/b/run")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = popen(*FLOW, "--steps", 1, "--out", tmp_path / "run", script="flow.py", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2",
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        said = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in said
    assert "error: process 0 cannot join the others (" in said and "MASTER_PORT" in said
