"""``farebox dodo dead`` and ``farebox dodo revive``: events that Dodo refused for good, listed and sent again.

Knows options and tables; what reviving means is the outbox's.
"""

import json
from dataclasses import replace
from typing import Annotated

import typer
from rich.table import Table

from billing.export.events import SealedEvent
from billing.export.outbox import Outbox
from billing.money import format_usd
from cluster.cli.books import JsonOption, ask, err, out, store
from cluster.cli.standing import Standing


def dead(as_json: JsonOption = False) -> None:
    """Show the events that Dodo refused for good, oldest first, each with its reason."""
    letters = ask(_dead)
    if as_json:
        print(json.dumps([_letter_json(letter) for letter in letters], indent=2))
        return
    table = Table("id", "tenant", "event", "nanos", "usd", "reason")
    for column in table.columns[3:5]:
        column.justify = "right"
    for letter in letters:
        table.add_row(
            letter.id, letter.tenant, letter.name, str(letter.nanos), f"${format_usd(letter.nanos)}", letter.reason
        )
    out.print(table)


def revive(
    id_: Annotated[str, typer.Argument(metavar="ID", help="of one dead event, as `farebox dodo dead` shows it")] = "",
    every: Annotated[bool, typer.Option("--all", help="all of them")] = False,
) -> None:
    """Send dead events again, with the same ids and quantities. First mend what the reason says."""
    if bool(id_) == every:
        raise typer.BadParameter("give the id of one event, or --all")
    letters = ask(_dead)
    chosen = letters if every else [letter for letter in letters if letter.id == id_]
    if id_ and not chosen:
        err.print(f"[bold red]farebox:[/] no dead event has id {id_}: see `farebox dodo dead`", highlight=False)
        raise typer.Exit(1)
    revived = ask(lambda standing: _revive(standing, chosen))
    out.print(f"{revived} of {len(letters)} dead events go out with the next flush")


async def _dead(standing: Standing) -> list[SealedEvent]:
    async with store(standing) as redis:
        return await Outbox(redis).dead()


async def _revive(standing: Standing, letters: list[SealedEvent]) -> int:
    """How many this call revived: another one may have been faster."""
    async with store(standing) as redis:
        outbox = Outbox(redis)
        return sum([await outbox.revive(replace(letter, reason="")) for letter in letters])


def _letter_json(letter: SealedEvent) -> dict[str, object]:
    return {
        "id": letter.id,
        "tenant": letter.tenant,
        "event": letter.name,
        "nanos": letter.nanos,
        "reason": letter.reason,
    }
