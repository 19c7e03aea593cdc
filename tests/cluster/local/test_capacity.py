"""How many replicas fit, by what Ray has left and by free memory; ``farebox scale`` refuses more."""

import os

import psutil
import pytest

from cluster.local.capacity import SPARE_SHARE, limits
from cluster.local.launch import LaunchError, refuse_without_room
from cluster.serve_api import Application, Deployment, ServeApi, ServeConfig

ONE_OF_FOUR = {"CPU": (0.7, 4.0)}


class Cluster(ServeApi):
    """A client of a cluster with fixed figures instead of a dashboard."""

    def __init__(self, usage: dict[str, tuple[float, float]], pids: tuple[int, ...]) -> None:
        self._usage = usage
        states = ("RUNNING",) * len(pids)
        replica = Deployment("LoraReplica", "HEALTHY", "", states, len(pids), pids)
        self._apps = {"farebox": Application("farebox", "RUNNING", "", (replica,))}

    def applications(self) -> dict[str, Application]:
        return self._apps

    def usage(self) -> dict[str, tuple[float, float]]:
        return self._usage


def config(**options: object) -> ServeConfig:
    replica = {"name": "LoraReplica", "ray_actor_options": options}
    return {"applications": [{"name": "farebox", "deployments": [replica]}]}


@pytest.mark.parametrize(
    ("options", "usage", "more"),
    [
        ({"num_cpus": 0.5}, ONE_OF_FOUR, 6),
        ({"num_cpus": 0.1}, {"CPU": (0.7000000000000002, 1.0)}, 3),
        ({}, ONE_OF_FOUR, 3),
        ({"num_cpus": 2, "num_gpus": 1}, {"CPU": (0.0, 64.0), "GPU": (1.0, 4.0)}, 3),
        ({"num_cpus": 0, "num_gpus": 1}, {"CPU": (0.0, 64.0)}, 0),
        ({"num_cpus": 0.5, "memory": 2**30}, {"CPU": (0.0, 64.0), "memory": (2.0**30, 4.0 * 2**30)}, 3),
        ({"num_cpus": 0.5}, {"CPU": (4.0, 4.0)}, 0),
    ],
)
def test_what_ray_has_left_limits_replicas(
    options: dict[str, object], usage: dict[str, tuple[float, float]], more: int
) -> None:
    assert limits(options, usage, ())[0].more == more


def test_nothing_limits_what_is_not_reported() -> None:
    assert limits({"num_cpus": 0.5}, {}, ()) == []
    assert limits({"num_cpus": 0}, ONE_OF_FOUR, ()) == []
    assert limits({"num_cpus": 0}, ONE_OF_FOUR, (2**22 - 3,)) == [], "a replica that has just ended"


def test_memory_limits_replicas() -> None:
    each, machine = psutil.Process().memory_full_info().uss, psutil.virtual_memory()
    (limit,) = limits({"num_cpus": 0}, ONE_OF_FOUR, (os.getpid(),))
    expected = (machine.available - machine.total // SPARE_SHARE) // each
    assert limit.more == pytest.approx(expected, rel=0.2)
    assert "MiB of memory" in limit.reason


@pytest.mark.parametrize(("replicas", "fits"), [(1, True), (7, True), (8, False), (50, False)])
def test_more_replicas_than_fit_are_refused(replicas: int, fits: bool) -> None:
    cluster = Cluster(ONE_OF_FOUR, (2**22 - 3,))
    if fits:
        refuse_without_room(cluster, config(num_cpus=0.5), replicas)
        return
    with pytest.raises(LaunchError, match=f"{replicas} LoRA replicas do not fit, 7 do: each takes 0.5 CPU.*--force"):
        refuse_without_room(cluster, config(num_cpus=0.5), replicas)


def test_fewer_replicas_are_never_refused() -> None:
    full = Cluster({"CPU": (4.0, 4.0)}, (2**22 - 3, 2**22 - 4, 2**22 - 5))
    refuse_without_room(full, config(num_cpus=0.5), 2)
    refuse_without_room(full, config(num_cpus=0.5), 3)
    with pytest.raises(LaunchError, match="4 LoRA replicas do not fit, 3 do"):
        refuse_without_room(full, config(num_cpus=0.5), 4)
