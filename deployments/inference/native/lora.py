"""Many adapters in one batch: low-rank factors in preallocated slots, applied to rows sorted by slot.

A step names the rows of each slot; every wrapped linear adds ``(x A) B`` of the row's own slot. Rows of
the base model stand last and never enter this arithmetic, so that adapters cannot change a bit of them.
Knows slots and tensors, no adapters' names.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from deployments.inference.adapters import AdapterFiles, LinearShape
from deployments.inference.native.lora_math import RowPlan, expand, shrink

RANK_STEP = 8
"""Ranks are computed in multiples of this: 16 bytes of bfloat16, as grouped matrix products want."""
EFFECT_TOLERANCE = 0.05
"""Largest difference between a product in the pool and the adapter's own, as a share of it: bfloat16 rounds twice."""
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Siblings that read the same input, so that one product with all their A factors serves them."""


@dataclass(frozen=True, slots=True)
class HostFactors:
    """One module's factors in the pool's type: ``a`` ``[rank, in]``, ``b`` ``[rank, out]``, the scaling in b."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter ready to be copied into a slot."""

    modules: Mapping[str, HostFactors]
    nbytes: int


@dataclass(slots=True)
class LoraStep:
    """What one step does to which rows, and what its modules have computed so far."""

    rows: RowPlan
    ranks: Mapping[str, int]
    """Module to the largest rank of any adapter in the step; a module that none changes is left out."""
    shrunk: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Group to its last input and that input's product with A, for the siblings that read the same input."""

    def add(self, linear: "LoraLinear", x: Tensor, y: Tensor) -> None:
        rank = self.ranks.get(linear.name, 0)
        if rank:
            shrunk = linear.group.shrink(x, self)[:, :rank, linear.member]
            expand(y.view(-1, y.shape[-1]), shrunk, linear.b[:, :rank], self.rows)


class Additions(Protocol):
    """A step, to its wrapped linears."""

    def add(self, linear: "LoraLinear", x: Tensor, y: Tensor) -> None:
        """Add to ``y [..., out]`` what the step's adapters make of ``x [..., in]``."""


class LoraGroup:
    """The A factors of modules that read the same input: ``[slots, rank, members, in]``.

    Rank comes before member so that the first r ranks of all members are one run of memory.
    """

    def __init__(self, members: Seq[str], slots: int, max_rank: int, in_features: int, like: Tensor) -> None:
        self.members = tuple(members)
        self.ranks = torch.zeros(slots, len(members), dtype=torch.int64, device=like.device)
        """Of each slot's adapter in each member; on a GPU, where kernels read it."""
        self.a = like.new_zeros(slots, max_rank, len(members), in_features)

    def shrink(self, x: Tensor, step: LoraStep) -> Tensor:
        """x ``[..., in]`` -> what ``expand`` takes, computed once for all members that read the same ``x``."""
        last = step.shrunk.get(id(self))
        if last is not None and last[0] is x:
            return last[1]
        rank = max(step.ranks.get(member, 0) for member in self.members)
        shrunk = shrink(x.view(-1, x.shape[-1]), self.a[:, :rank], step.rows)
        step.shrunk[id(self)] = (x, shrunk)
        return shrunk


class LoraLinear(nn.Module):
    """A linear of the base model, and what the adapters add to it."""

    def __init__(self, base: nn.Module, name: str, group: LoraGroup, b: Tensor, pool: "LoraPool") -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.group = group
        self.member = group.members.index(name)
        self.b = b
        """``[slots, rank, out]``."""
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self._pool.step is not None:
            self._pool.step.add(self, x, y)
        return y


class LoraPool:
    """All slots of all wrapped modules. Slots in use and slots being written are never the same."""

    def __init__(self, model: nn.Module, linears: Mapping[str, LinearShape], slots: int, max_rank: int) -> None:
        self.step: Additions | None = None
        self._groups: dict[str, LoraGroup] = {}
        self._b: dict[str, Tensor] = {}
        self._slot_ranks: list[dict[str, int]] = [{} for _ in range(slots)]
        for members in _groups(linears):
            weight = next(iter(model.get_submodule(members[0]).parameters()))
            like = torch.empty(0, dtype=weight.dtype, device=weight.device)
            group = LoraGroup(members, slots, max_rank, linears[members[0]].in_features, like)
            for name in members:
                self._groups[name] = group
                self._b[name] = like.new_zeros(slots, max_rank, linears[name].out_features)
                model.set_submodule(name, LoraLinear(model.get_submodule(name), name, group, self._b[name], self))

        self._device = next(iter(self._b.values())).device
        self._copies = _stream(self._device)

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._b.values())).dtype

    @property
    def is_on_gpu(self) -> bool:
        return self._copies is not None

    def write(self, slot: int, adapter: HostAdapter) -> None:
        """Put an adapter into a slot that no step uses, and wait until it is there; any thread may.

        On a GPU the copies run beside the steps, but after those already begun: an aborted one may still read the slot.
        """
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.default_stream(self._device))
        with self.beside_steps():
            self._copy(slot, adapter)
        if self._copies is not None:
            self._copies.synchronize()

    def beside_steps(self) -> AbstractContextManager[object]:
        """What is computed in here does not queue behind the steps."""
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)

    @torch.no_grad()
    def _copy(self, slot: int, adapter: HostAdapter) -> None:
        for name, b in self._b.items():
            group = self._groups[name]
            a = group.a[slot, :, group.members.index(name)]
            factors = adapter.modules.get(name)
            rank = 0 if factors is None else len(factors.a)
            if factors is not None:
                a[:rank].copy_(factors.a, non_blocking=True)
                b[slot, :rank].copy_(factors.b, non_blocking=True)
            a[rank:].zero_()
            b[slot, rank:].zero_()
            group.ranks[slot, group.members.index(name)].fill_(rank)
        self._slot_ranks[slot] = {name: len(factors.a) for name, factors in adapter.modules.items()}

    @torch.inference_mode()
    def ineffective(self, slot: int, adapter: HostAdapter) -> str:
        """The first module in which a row of this slot gets another product than the adapter's own; empty if none."""
        plan = RowPlan.of({slot: 1}, self._device)
        for name, factors in adapter.modules.items():
            group, b = self._groups[name], self._b[name]
            a = factors.a.to(self._device)
            probe = torch.linspace(-1, 1, a.shape[1], dtype=self.dtype, device=self._device)[None]
            rank = -(-len(a) // RANK_STEP) * RANK_STEP
            got = b.new_zeros(1, b.shape[2])
            shrunk = shrink(probe, group.a[:, :rank], plan)[:, :, group.members.index(name)]
            expand(got, shrunk, b[:, :rank], plan)
            wanted = probe.float() @ a.t().float() @ factors.b.to(self._device).float()
            if not (got.float() - wanted).abs().max() <= EFFECT_TOLERANCE * wanted.abs().max():
                return name
        return ""

    def plan(self, rows_by_slot: Mapping[int, int]) -> LoraStep | None:
        """The step over these slots, each with its number of rows; None if there are none."""
        if not rows_by_slot:
            return None
        ranks: dict[str, int] = {}
        for slot in rows_by_slot:
            for name, rank in self._slot_ranks[slot].items():
                ranks[name] = max(ranks.get(name, 0), -(-rank // RANK_STEP) * RANK_STEP)
        return LoraStep(RowPlan.of(rows_by_slot, self._device), ranks)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def pin(adapter: HostAdapter) -> HostAdapter:
    """The same adapter in one run of page-locked memory, from which a GPU copies without stopping anybody."""
    tensors = [tensor for factors in adapter.modules.values() for tensor in (factors.a, factors.b)]
    run = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=tensors[0].dtype, pin_memory=True)
    parts = iter(torch.split(run, [tensor.numel() for tensor in tensors]))
    modules = {
        name: HostFactors(
            a=next(parts).view_as(factors.a).copy_(factors.a), b=next(parts).view_as(factors.b).copy_(factors.b)
        )
        for name, factors in adapter.modules.items()
    }
    return HostAdapter(modules=modules, nbytes=adapter.nbytes)


def stage(files: AdapterFiles, dtype: torch.dtype) -> HostAdapter:
    """Bring an adapter from its file's types into the pool's, the scaling multiplied into B."""
    modules: dict[str, HostFactors] = {}
    for name, delta in files.info.modules.items():
        a = torch.from_numpy(files.tensor(delta.a).copy()).to(dtype)
        b = torch.from_numpy(files.tensor(delta.b) * delta.scaling).t().contiguous().to(dtype)
        modules[name] = HostFactors(a=a, b=b)
    nbytes = sum(factors.a.nbytes + factors.b.nbytes for factors in modules.values())
    return HostAdapter(modules=modules, nbytes=nbytes)


def _groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Modules that read the same input, together; all others alone."""
    known = dict.fromkeys(names)
    groups: list[tuple[str, ...]] = []
    for name in list(known):
        if name not in known:
            continue
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in SHARED_INPUTS if leaf in group), (leaf,))
        members = tuple(path for path in (f"{parent}.{sibling}" for sibling in siblings) if path in known)
        groups.append(members or (name,))
        for member in groups[-1]:
            del known[member]
    return groups
