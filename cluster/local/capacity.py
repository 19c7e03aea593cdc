"""How many more LoRA replicas the machine has room for: by what Ray has not given away, and by free memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

SPARE_SHARE = 10
"""A tenth of the machine's memory stays free."""
_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
"""Options of a Ray actor, and Ray's names for what they reserve."""
_NOTHING_SAID = {"num_cpus": 1.0}
"""What Ray reserves for an actor whose options do not say."""

Usage = Mapping[str, tuple[float, float]]
"""Of each of Ray's resources, such as ``CPU``: how much is given away, and how much there is."""


@dataclass(frozen=True)
class Limit:
    """Why no more than ``more`` replicas can be added."""

    more: int
    reason: str


def limits(actor_options: Mapping[str, object], usage: Usage, replica_pids: tuple[int, ...]) -> list[Limit]:
    """What limits the number of replicas, the tightest first; nothing for a resource that Ray does not report."""
    return sorted([*_by_ray(actor_options, usage), *_by_memory(replica_pids)], key=lambda limit: limit.more)


def _by_ray(actor_options: Mapping[str, object], usage: Usage) -> list[Limit]:
    found = []
    for option, name in _NAMES.items():
        each = float(str(actor_options.get(option, _NOTHING_SAID.get(option)) or 0))
        if not each or not usage:
            continue
        used, total = usage.get(name, (0.0, 0.0))
        reason = f"each takes {each:g} {name}, and Ray has {total - used:g} of {total:g} left"
        found.append(Limit(int((total - used + 1e-6) // each), reason))
    return found


def _by_memory(replica_pids: tuple[int, ...]) -> list[Limit]:
    """A new replica takes about as much as one that runs."""
    each = max((_own_bytes(pid) for pid in replica_pids), default=0)
    if not each:
        return []
    machine = psutil.virtual_memory()
    free = max(0, machine.available - machine.total // SPARE_SHARE)
    reason = f"each that runs has {each // 1024**2} MiB of memory, and {free // 1024**2} MiB are free"
    return [Limit(free // each, reason)]


def _own_bytes(pid: int) -> int:
    """Memory that a process shares with no other; 0 if it has ended or belongs to another user."""
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0
