"""The mutants keep up with what they change: each removes a rule that stands, and leaves a program."""

import pytest
from redis.asyncio import Redis

from billing.store.scripts import source
from tests.billing.ledger.mutant_rules import CONTROL, Mutant
from tests.billing.ledger.mutants import BILLING, MUTANTS, file_of

SCRIPTS = [f"{path.parent.parent.name}/{path.stem}" for path in BILLING.glob("*/lua/*.lua")]


@pytest.mark.parametrize("mutant", [CONTROL, *MUTANTS], ids=lambda mutant: mutant.name)
async def test_a_mutant_removes_one_rule_and_is_a_program(mutant: Mutant, store: Redis) -> None:
    text = file_of(mutant).read_text()
    assert text.count(mutant.rule) == 1
    if mutant.file.endswith(".py"):
        compile(text.replace(mutant.rule, mutant.instead), mutant.file, "exec")
        return
    changed = [whole for whole in map(source, SCRIPTS) if mutant.rule in whole]
    assert changed
    for whole in changed:
        await store.script_load(whole.replace(mutant.rule, mutant.instead))


def test_no_two_mutants_share_a_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
