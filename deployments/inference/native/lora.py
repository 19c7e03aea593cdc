"""Batched LoRA: the factors of many adapters in preallocated slots, applied to rows sorted by slot.

Every wrapped linear adds ``(x A) B`` with the factors of each row's own slot: shrink, ``h = x A``, then expand,
``y += h B``. Rows of the base model come last and take no part, so that adapters cannot change a bit of them.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.inference.adapters import AdapterFiles, LinearShape

RANK_STEP = 8
"""Ranks are computed in multiples of this: grouped matrix products need rows of 16 bytes, 8 numbers in bfloat16."""
EFFECT_TOLERANCE = 0.05
"""Largest difference between a slot's product and the adapter's own, relative to the latter: bfloat16 rounds twice."""
MAX_PADDING = 2
"""Slots are padded to the same number of rows while that computes at most this many times the rows there are."""
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling modules that read the same input, so that one product with all their A factors serves them."""


class LoraPool:
    """The slots of all wrapped modules. A slot is never written while a step uses it."""

    def __init__(self, model: nn.Module, linears: Mapping[str, LinearShape], slots: int, max_rank: int) -> None:
        self.step: LoraDelta | None = None
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

    def write(self, slot: int, adapter: "HostAdapter") -> None:
        """Copy an adapter into a slot that no step uses, and wait until it is there. Any thread may call it.

        On a GPU the copies run on a stream of their own, but after the steps already launched: one of those may still
        read the slot for a request that was aborted.
        """
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.default_stream(self._device))
        with self.beside_steps():
            self._copy(slot, adapter)
        if self._copies is not None:
            self._copies.synchronize()

    def beside_steps(self) -> AbstractContextManager[object]:
        """A context in which GPU work does not queue behind the steps."""
        return nullcontext() if self._copies is None else torch.cuda.stream(self._copies)

    @torch.no_grad()
    def _copy(self, slot: int, adapter: "HostAdapter") -> None:
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
    def ineffective(self, slot: int, adapter: "HostAdapter") -> str:
        """The first module in which the slot computes another product than the adapter itself; empty if none does."""
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

    def plan(self, rows_by_slot: Mapping[int, int]) -> "LoraStep | None":
        """What a step adds, from the number of its rows of each slot; None if no row has a slot."""
        if not rows_by_slot:
            return None
        ranks: dict[str, int] = {}
        for slot in rows_by_slot:
            for name, rank in self._slot_ranks[slot].items():
                ranks[name] = max(ranks.get(name, 0), -(-rank // RANK_STEP) * RANK_STEP)
        return LoraStep(RowPlan.of(rows_by_slot, self._device), ranks)


class LoraLinear(nn.Module):
    """A linear layer of the base model, plus what the adapters add to it."""

    def __init__(self, base: nn.Module, name: str, group: "LoraGroup", b: Tensor, pool: LoraPool) -> None:
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


class LoraGroup:
    """The A factors of modules that read the same input: ``[slots, rank, members, in]``.

    Rank comes before member, so that the first r ranks of all members are contiguous.
    """

    def __init__(self, members: Seq[str], slots: int, max_rank: int, in_features: int, like: Tensor) -> None:
        self.members = tuple(members)
        self.ranks = torch.zeros(slots, len(members), dtype=torch.int64, device=like.device)
        """Rank of each slot's adapter in each member, ``[slots, members]``, for the GPU's kernels."""
        self.a = like.new_zeros(slots, max_rank, len(members), in_features)

    def shrink(self, x: Tensor, step: "LoraStep") -> Tensor:
        """x ``[..., in]`` -> what ``expand`` takes, computed once for all members that read the same ``x``."""
        last = step.shrunk.get(id(self))
        if last is not None and last[0] is x:
            return last[1]
        rank = max(step.ranks.get(member, 0) for member in self.members)
        shrunk = shrink(x.view(-1, x.shape[-1]), self.a[:, :rank], step.rows)
        step.shrunk[id(self)] = (x, shrunk)
        return shrunk


class LoraDelta(Protocol):
    """What the adapters of one step add to the wrapped linears."""

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> None:
        """Add ``(x A) B`` of the step's adapters to ``y [..., out]``, for ``x [..., in]``."""


@dataclass(slots=True)
class LoraStep:
    """What one step adds on a CPU: its rows by slot, and the products its modules share."""

    rows: "RowPlan"
    ranks: Mapping[str, int]
    """Module to the largest rank of any adapter in the step; modules that none changes are left out."""
    shrunk: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Group to its last input and that input's product with A, for the other members of the group."""

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> None:
        rank = self.ranks.get(linear.name, 0)
        if rank:
            shrunk = linear.group.shrink(x, self)[:, :rank, linear.member]
            expand(y.view(-1, y.shape[-1]), shrunk, linear.b[:, :rank], self.rows)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which rows of a step belong to which slot: the first ``rows``, sorted by slot, from ``low`` to ``high - 1``.

    Where the slots have about as many rows each, they are padded and computed as one batch of equal matrices::

        rows   a a b c c c      per slot = 3      padded  a a . | b . . | c c c
        gather 0 1 0 2 0 0 3 4 5   (a dot repeats row 0)      scatter 0 1 3 6 7 8
    """

    rows: int
    low: int
    high: int
    ends: Tensor
    """int32 ``[high - low]``: the end of each slot's rows."""
    per_slot: int
    """Rows of each slot after padding; 0: not padded, because the slots differ too much."""
    gather: Tensor | None
    """``[(high - low) * per_slot]``: the row of each padded position; None where nothing is padded."""
    scatter: Tensor | None
    """``[rows]``: the padded position of each row."""

    @classmethod
    def of(cls, rows_by_slot: Mapping[int, int], device: torch.device) -> "RowPlan":
        low, high = min(rows_by_slot), max(rows_by_slot) + 1
        counts = [rows_by_slot.get(slot, 0) for slot in range(low, high)]
        rows, most = sum(counts), max(counts)
        padded = most * len(counts)
        if padded > MAX_PADDING * rows:
            most = 0
        gather = scatter = None
        if most and padded != rows:
            positions = [slot * most + i for slot, count in enumerate(counts) for i in range(count)]
            scatter = torch.tensor(positions, device=device)
            gather = torch.zeros(padded, dtype=torch.long, device=device)
            gather[scatter] = torch.arange(rows, device=device)
        ends = torch.tensor(counts).cumsum(0).to(device=device, dtype=torch.int32)
        return cls(rows=rows, low=low, high=high, ends=ends, per_slot=most, gather=gather, scatter=scatter)


def shrink(x: Tensor, a: Tensor, plan: RowPlan) -> Tensor:
    """``x [T, in]``, ``a [slots, rank, members, in]`` -> ``[slots or 1, rank, members, rows]``, for ``expand``."""
    factors = a[plan.low : plan.high].flatten(1, 2)
    if not plan.per_slot:
        product = functional.grouped_mm(x[: plan.rows], factors.transpose(1, 2), offs=plan.ends)
        return product.t().view(1, a.shape[1], a.shape[2], plan.rows)
    placed = x[: plan.rows] if plan.gather is None else x.index_select(0, plan.gather)
    product = torch.bmm(factors, placed.view(-1, plan.per_slot, x.shape[1]).transpose(1, 2))
    return product.view(-1, a.shape[1], a.shape[2], plan.per_slot)


def expand(y: Tensor, h: Tensor, b: Tensor, plan: RowPlan) -> None:
    """Add one member's product to ``y [T, out]``: ``h [slots or 1, rank, rows]`` and ``b [slots, rank, out]``."""
    factors, mine = b[plan.low : plan.high], y[: plan.rows]
    if not plan.per_slot:
        mine += functional.grouped_mm(h[0].t().contiguous(), factors, offs=plan.ends)
    elif plan.scatter is None:
        mine.view(-1, plan.per_slot, y.shape[1]).baddbmm_(h.transpose(1, 2), factors)
    else:
        mine += torch.bmm(h.transpose(1, 2), factors).view(-1, y.shape[1]).index_select(0, plan.scatter)


@dataclass(frozen=True, slots=True)
class HostFactors:
    """One module's factors in the pool's dtype: ``a [rank, in]`` and ``b [rank, out]``, which includes the scaling."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory, ready to be copied into a slot."""

    modules: Mapping[str, HostFactors]
    nbytes: int


def pin_memory(adapter: HostAdapter) -> HostAdapter:
    """Copy an adapter into page-locked memory, from which copies to a GPU run beside its steps."""
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
    """Convert an adapter from its file's types into this one, its scaling multiplied into B."""
    modules: dict[str, HostFactors] = {}
    for name, delta in files.info.modules.items():
        a = torch.from_numpy(files.tensor(delta.a).copy()).to(dtype)
        b = torch.from_numpy(files.tensor(delta.b) * delta.scaling).t().contiguous().to(dtype)
        modules[name] = HostFactors(a=a, b=b)
    nbytes = sum(factors.a.nbytes + factors.b.nbytes for factors in modules.values())
    return HostAdapter(modules=modules, nbytes=nbytes)


def _groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The modules in groups that read the same input; most are alone."""
    left = dict.fromkeys(names)
    groups: list[tuple[str, ...]] = []
    for name in list(left):
        if name not in left:
            continue
        parent, _, leaf = name.rpartition(".")
        siblings = next((group for group in SHARED_INPUTS if leaf in group), (leaf,))
        members = tuple(path for path in (f"{parent}.{sibling}" for sibling in siblings) if path in left)
        groups.append(members or (name,))
        for member in groups[-1]:
            del left[member]
    return groups


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
