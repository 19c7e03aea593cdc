"""On a full disk ``run.json`` stays true, and a child that has ended is started again within a budget."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.local.restarts import RESTARTS_MAX, WINDOW_S, Restarts
from cluster.local.settings import Settings
from cluster.local.state import Home, Phase, write_private
from tests.support.cli import run_of
from tests.support.disk import fill, small_disk


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with small_disk(tmp_path / "disk", 2) as disk:
        yield Home.open(Settings(home=disk / ".farebox", config=tmp_path / "serve_config.yaml"))


def test_run_is_written_on_a_full_disk(home: Home) -> None:
    healthy = home.write_run(replace(run_of(os.getpid()), phase=Phase.HEALTHY, pids={"store": 1}))
    ballast = fill(home.path)
    degraded = home.write_run(replace(healthy, phase=Phase.DEGRADED, problem="less than 64 MiB are free"))
    assert home.read_run() == degraded
    assert home.write_run(replace(healthy, step="x")) == home.read_run(), "a shorter content leaves nothing of a longer"
    ballast.unlink()
    assert home.write_run(healthy) == home.read_run()
    assert [file.name for file in home.path.iterdir() if file.name.startswith(".")] == []


def test_run_that_fits_nowhere_is_not_left_as_healthy(home: Home) -> None:
    healthy = home.write_run(replace(run_of(os.getpid()), phase=Phase.HEALTHY))
    fill(home.path)
    home.write_run(replace(healthy, phase=Phase.DEGRADED, problem="long " * 10_000))
    assert home.read_run() is None


def test_private_file_survives_a_full_disk(home: Home) -> None:
    write_private(home.deployed, "{}")
    fill(home.path)
    with pytest.raises(OSError, match="No space left"):
        write_private(home.deployed, "x" * 100_000)
    assert home.deployed.read_text() == "{}\n"
    assert not list(home.path.glob(".deployed*"))


def test_restarts_wait_longer_and_are_counted_by_the_hour() -> None:
    restarts, at, times = Restarts(), 0.0, []
    for number in range(1, RESTARTS_MAX + 2):
        while not restarts.is_due("the store", at):
            at += 1.0
        assert restarts.note("the store", at) == number
        times.append(at)
    waited = [int(late - early) for early, late in pairwise(times)]
    assert waited == [1, 3, 7, 15, 31, 60, 60, 60, 60, 60]
    assert restarts.is_due("the sandbox", at), "each child has a budget of its own"
    assert restarts.note("the sandbox", at) == 1
    assert restarts.note("the store", at + WINDOW_S) == 1, "an hour later they are forgotten"
