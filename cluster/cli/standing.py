"""Where a command finds the books: the farebox of this folder, or a cluster's, by the environment alone.

Knows which of both is meant and what the configuration says of its store; opens nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from cluster.cli.operate import NotRunning, Running
from cluster.local.launch import StoreTerms, store_terms_in
from cluster.local.settings import Settings


@dataclass(frozen=True)
class Standing:
    """The settings and the variables under which a farebox runs, here or on a cluster."""

    settings: Settings
    environment: Mapping[str, str]
    terms: StoreTerms
    """On which its store is used."""

    @classmethod
    def find(cls, settings: Settings, env: Mapping[str, str] = os.environ) -> Self:
        """The farebox that runs in this folder, else the one whose store is ``REDIS_URL``.

        Raises:
            NotRunning: neither.
        """
        try:
            running = Running.find(settings)
        except NotRunning as error:
            if not env.get("REDIS_URL"):
                raise NotRunning(f"{error}; for one on a cluster set REDIS_URL and Dodo's variables") from None
            return cls(settings, dict(env), store_terms_in(settings.config))
        return cls(running.settings, running.environment(), running.terms)

    @property
    def store_url(self) -> str:
        return self.environment["REDIS_URL"]
