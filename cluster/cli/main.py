"""The ``farebox`` command: puts its commands together, and reports their errors."""

import typer
from typer.core import TyperGroup

from billing.errors import BillingError
from cluster.cli import (
    demo,
    deploy,
    dodo,
    keys,
    lifecycle,
    migrate,
    notices,
    reconcile,
    report,
    status,
    tenants,
    unresolved,
    usage,
    webhooks,
)
from cluster.cli.output import fail
from cluster.errors import ClusterError
from cluster.local.state import NO_ROOM


class Commands(TyperGroup):
    """All commands. An error is one message on stderr and exit code 1."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # the supertype's Context is private
        try:
            return super().invoke(ctx)
        except (ClusterError, BillingError) as error:
            fail(str(error))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            fail(f"{error.strerror}: make room for {error.filename or 'what this command writes'}, then try again")


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sell your LoRA adapters as an API.",
)
app.command()(lifecycle.up)
app.command()(lifecycle.down)
app.command()(status.status)
app.command()(lifecycle.logs)
app.command()(lifecycle.token)
app.command()(deploy.check)
app.command()(deploy.deploy)
app.command()(deploy.scale)
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.command()(usage.usage)
app.command()(report.report)
app.command()(report.price)
app.command()(notices.notices)
app.command()(reconcile.reconcile)
app.command()(migrate.migrate)
app.add_typer(unresolved.app, name="unresolved")
app.add_typer(unresolved.app, name="quarantine", hidden=True)  # its name before 0.2
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(dodo.app, name="dodo")
app.command("dodo-sandbox", context_settings=dodo.SANDBOX_CONTEXT)(dodo.dodo_sandbox)
app.add_typer(demo.app, name="demo")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
