"""What the last passes over the books found, as the billing actor stored it for people."""

import json
from dataclasses import asdict, dataclass

from redis.asyncio import Redis

from billing.store.connection import guarded
from billing.store.guard import BULK_DEADLINE_S
from billing.store.keys import PROOF
from billing.store.write import write


@dataclass(frozen=True, slots=True)
class ProofState:
    """One kind of pass: ``store`` reads the store alone, ``dodo`` Dodo too."""

    at_ms: int = 0
    """When it ended; 0 before the first."""
    proofs: int = 0
    faults: int = 0
    """Proofs that do not hold."""
    drift_nanos: int = 0
    named: str = ""
    """The first fault: proof, tenant, and what differs."""
    unproven: str = ""
    """Why a proof could not be made."""


async def show(redis: Redis, kind: str, state: ProofState) -> None:
    async with guarded(BULK_DEADLINE_S):
        await write(redis, ("HSET", PROOF, kind, json.dumps(asdict(state))))


async def shown(redis: Redis) -> dict[str, ProofState]:
    """By kind of pass; those that never ended are left out."""
    async with guarded(BULK_DEADLINE_S):
        found = await redis.hgetall(PROOF)
    return {str(kind): ProofState(**json.loads(text)) for kind, text in sorted(found.items())}
