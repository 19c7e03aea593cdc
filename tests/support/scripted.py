"""A ``ReplicaLink`` whose output is set beforehand. Tokens are counted as an engine counts them."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace

from deployments.inference.request import Choice, EngineStats, FinishReason, GenerateRequest, Logprob, OutputDelta


@dataclass
class ScriptedLink:
    """Answers ``tok0 tok1 ...`` up to ``length`` or ``max_tokens``; ``failure`` is raised before token ``fails_at``."""

    length: int = 5
    pause_s: float = 0.0
    failure: Exception | None = None
    fails_at: int = 0
    ends_with: FinishReason | None = None
    """In place of the finish reason of the last delta."""
    is_up: bool = True
    busy: EngineStats = field(default_factory=EngineStats)
    cached_tokens: int = 0
    compute_ms: int = 1
    """For each token."""
    requests: list[GenerateRequest] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    """Tokens generated, by request id: it stops growing when a request is aborted."""
    aborted: list[str] = field(default_factory=list)
    extended: list[Mapping[str, float]] = field(default_factory=list)
    slow: frozenset[str] = frozenset()
    """Requests that were cancelled because their client does not read."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[OutputDelta, None]:
        self.requests.append(request)
        is_over = False
        try:
            wanted = min(self.length, request.sampling.max_tokens)
            for number in range(wanted):
                if self.failure is not None and number == self.fails_at:
                    is_over = True
                    raise self.failure
                await asyncio.sleep(self.pause_s)
                self.steps[request.request_id] = number + 1
                is_over = number + 1 == wanted
                yield self._delta(request, number, self._reason(request) if is_over else None)
        finally:
            if not is_over:
                self.aborted.append(request.request_id)

    def _delta(self, request: GenerateRequest, number: int, reason: FinishReason | None) -> OutputDelta:
        answers, text = request.sampling.n, f"tok{number} "
        choices = tuple(self._choice(request, index, number, reason) for index in range(answers))
        is_plain = answers == 1 and request.sampling.logprobs is None
        return OutputDelta(
            token_ids=(number,) * answers,
            text=text if is_plain else "",
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=min(self.cached_tokens, len(request.prompt_token_ids)),
            completion_tokens=(number + 1) * answers,
            compute_ms=(number + 1) * self.compute_ms,
            finish_reason=reason,
            choices=() if is_plain else choices,
        )

    def _choice(self, request: GenerateRequest, index: int, number: int, reason: FinishReason | None) -> Choice:
        """Answer ``index`` of several says ``1tok0``, ``2tok0``..., and each token is as likely as the one before."""
        logprobs: tuple[Logprob, ...] = ()
        if (count := request.sampling.logprobs) is not None:
            logprobs = (Logprob(number, -0.5, tuple((token, -0.5 - token) for token in range(count))),)
        return Choice(index, f"{index or ''}tok{number} ", logprobs, reason)

    def _reason(self, request: GenerateRequest) -> FinishReason:
        full = FinishReason.LENGTH if self.length >= request.sampling.max_tokens else FinishReason.STOP
        return self.ends_with or full

    async def extend(self, deadlines: Mapping[str, float]) -> frozenset[str]:
        self.extended.append(deadlines)
        return self.slow & deadlines.keys()

    async def is_ready(self) -> bool:
        return self.is_up

    async def stats(self) -> Mapping[str, EngineStats]:
        steps = sum(self.steps.values())
        return {"scripted": replace(self.busy, steps=steps, generation_tokens=steps)} if self.is_up else {}
