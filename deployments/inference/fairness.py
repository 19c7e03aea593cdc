"""Virtual token counters: how much service each fairness key has received, to serve the one with the least next.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588). A key that returns after
a pause starts no lower than the active keys, so that it saves up no service.
"""

PROMPT_WEIGHT = 1
COMPLETION_WEIGHT = 2
MAX_IDLE_KEYS = 4096
"""Keys without requests that are remembered."""


class TokenCounters:
    """Service received by each key: its weighted tokens, divided by the key's weight."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}
        """Key to its number of requests in the engine."""
        self._weights: dict[str, float] = {}
        self._floor = 0.0
        """Where a key starts when no other is active: the service of the last one that was."""

    def enter(self, key: str, weight: float = 1.0) -> None:
        """Count a request of this key. The key's latest weight applies."""
        self._weights[key] = weight
        if key not in self._active:
            lowest = min((self._served[other] for other in self._active), default=self._floor)
            self._served[key] = max(self._served.pop(key, 0.0), lowest)
        self._active[key] = self._active.get(key, 0) + 1

    def leave(self, key: str) -> None:
        """Stop counting a request of this key."""
        self._active[key] -= 1
        if self._active[key]:
            return
        del self._active[key], self._weights[key]
        if not self._active:
            self._floor = self._served[key]
        if len(self._served) > MAX_IDLE_KEYS + len(self._active):
            del self._served[next(other for other in self._served if other not in self._active)]

    def charge(self, key: str, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Add computed tokens to the service of an active key."""
        tokens = PROMPT_WEIGHT * prompt_tokens + COMPLETION_WEIGHT * completion_tokens
        self._served[key] += tokens / self._weights[key]

    def served(self, key: str) -> float:
        """The service that an active key has received."""
        return self._served[key]

    def weight(self, key: str) -> float:
        return self._weights[key]
