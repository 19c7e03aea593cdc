"""Whose turn it is: a virtual token counter for each fairness key, running slower for keys of more weight.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588): the
waiting key that has received the least service goes next, and a key that comes back after a pause
starts no lower than those that stayed.
"""

PROMPT_WEIGHT = 1
COMPLETION_WEIGHT = 2
IDLE_KEYS_KEPT = 4096


class TokenCounters:
    """Service received by each key, in weighted tokens, over the key's own weight."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._active: dict[str, int] = {}
        """Key to its number of requests in the engine."""
        self._weights: dict[str, float] = {}
        self._floor = 0.0
        """Where a key starts when no other is active: the service of the last that left."""

    def enter(self, key: str, weight: float = 1.0) -> None:
        """A request of this key has come; the latest weight of a key counts."""
        self._weights[key] = weight
        if key not in self._active:
            lowest = min((self._served[other] for other in self._active), default=self._floor)
            self._served[key] = max(self._served.pop(key, 0.0), lowest)
        self._active[key] = self._active.get(key, 0) + 1

    def leave(self, key: str) -> None:
        """A request of this key has ended."""
        self._active[key] -= 1
        if self._active[key]:
            return
        del self._active[key], self._weights[key]
        if not self._active:
            self._floor = self._served[key]
        if len(self._served) > IDLE_KEYS_KEPT + len(self._active):
            del self._served[next(other for other in self._served if other not in self._active)]

    def charge(self, key: str, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        tokens = PROMPT_WEIGHT * prompt_tokens + COMPLETION_WEIGHT * completion_tokens
        self._served[key] += tokens / self._weights[key]

    def served(self, key: str) -> float:
        return self._served[key]

    def weight(self, key: str) -> float:
        return self._weights[key]
