"""Is every rule of the ledger and of selling held by a test? Takes one away at a time and looks for a test that fails.

``python -m tests.billing.ledger.mutants [--only PART-OF-NAME]``: a table of mutants and what killed each, exit code 1
where one survived. A mutant lives in the memory of a process of its own; no file is changed.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.billing.commerce import mutant_rules as of_selling
from tests.billing.ledger import mutant_rules as of_the_ledger
from tests.billing.ledger.mutant_rules import CONTROL, Mutant

ROOT = Path(__file__).parent.parent.parent.parent
BILLING = ROOT / "billing"
MUTANTS = (*of_the_ledger.MUTANTS, *of_selling.MUTANTS)
LANES = 2
EXAMPLES, STEPS = 1_000, 40
MISWRITTEN = 3
"""Exit code of a mutant that changes nothing or is no program: the rule it removes is written differently by now."""


@dataclass(frozen=True)
class Verdict:
    """``killed_by`` is empty where the mutant survived; ``words`` are the killer's."""

    mutant: Mutant
    killed_by: str
    words: str
    seconds: float

    @property
    def line(self) -> str:
        fate = f"killed by {self.killed_by}" if self.killed_by else "SURVIVED"
        return f"{self.mutant.name:<68} {self.mutant.file:<20} {self.seconds:5.1f} s  {fate}  {self.words}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.billing.ledger.mutants", description=__doc__)
    parser.add_argument("--only", default="", metavar="PART-OF-NAME")
    parser.add_argument("--be", metavar="NAME", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.be:
        return _be(next(mutant for mutant in (CONTROL, *MUTANTS) if mutant.name == asked.be))
    chosen = [mutant for mutant in MUTANTS if asked.only in mutant.name]
    is_for_machine = any(not mutant.test for mutant in chosen)
    if is_for_machine and (control := _judge(CONTROL)).killed_by:
        raise SystemExit(f"no rule was removed and yet: {control.words}")
    survivors = []
    with ThreadPoolExecutor(LANES) as lanes:
        for verdict in lanes.map(_judge, chosen):
            print(verdict.line, flush=True)
            survivors += [] if verdict.killed_by else [verdict.mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed")
    return 1 if survivors or not chosen else 0


def _judge(mutant: Mutant) -> Verdict:
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.billing.ledger.mutants", "--be", mutant.name]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode == MISWRITTEN:
        raise SystemExit(f"{mutant.name}: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name} ended with {done.returncode}:\n{done.stderr}")
    lines = done.stdout.strip().splitlines()
    errors = [line.removeprefix("E ").strip() for line in lines if line.startswith("E ")]
    words = (errors or lines[-1:] or [""])[0]
    killed_by = (mutant.test or "the state machine") if done.returncode else ""
    return Verdict(mutant, killed_by, words[:60], time.monotonic() - started)


def _be(mutant: Mutant) -> int:
    """The life of a mutant's process. It fails where a test does."""
    text = file_of(mutant).read_text()
    if text.count(mutant.rule) != 1:
        print(f"{mutant.file} has {text.count(mutant.rule)} times: {mutant.rule!r}", file=sys.stderr)
        return MISWRITTEN
    if mutant.file.endswith(".lua"):
        _change_script(mutant)
    else:
        sys.meta_path.insert(0, _MutantFinder(mutant))
    return _run_test(mutant.test) if mutant.test else _run_machine()


def file_of(mutant: Mutant) -> Path:
    [found] = BILLING.glob(f"*/lua/**/{mutant.file}") if mutant.file.endswith(".lua") else [BILLING / mutant.file]
    return found


def _change_script(mutant: Mutant) -> None:
    from billing.store import scripts

    whole = scripts.source
    scripts.source = cache(lambda name: whole(name).replace(mutant.rule, mutant.instead))  # type: ignore[assignment]


def _run_machine() -> int:
    from hypothesis import Phase
    from redis.exceptions import ResponseError

    from cluster import valkey
    from tests.support.ledger_machine import drive, relax

    with tempfile.TemporaryDirectory(prefix="m") as folder:
        server = valkey.start(Path(folder))
        try:
            relax(server.url)
            drive(server.url, EXAMPLES, STEPS, phases=[Phase.generate])
        except ResponseError as error:
            print(error, file=sys.stderr)
            return MISWRITTEN
        except Exception as error:  # noqa: BLE001, any failure of the machine is what was looked for
            print(" ".join(repr(error).split()))
            return 1
        finally:
            server.stop()
    return 0


def _run_test(test: str) -> int:
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", test]))


class _MutantFinder(importlib.abc.MetaPathFinder):
    """Finds one module of billing, and reads it changed."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = "billing." + mutant.file.removesuffix(".py").replace("/", ".")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        loader = _MutantLoader(fullname, str(file_of(self._mutant)), self._mutant)
        return importlib.util.spec_from_loader(fullname, loader)


class _MutantLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def path_stats(self, path: str) -> dict[str, object]:  # type: ignore[override]
        raise OSError("a mutant is never read from nor kept in the cache of compiled modules")

    def get_data(self, path: str) -> bytes:
        return super().get_data(path).replace(self._mutant.rule.encode(), self._mutant.instead.encode())


if __name__ == "__main__":
    sys.exit(main())
