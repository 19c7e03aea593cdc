"""A pytest plugin: on a CI machine a skipped test fails the run, unless its reason is allowed.

A test is skipped where the machine lacks what it needs. On a CI machine that would hide a broken installation: there
every server and package is installed by ``.ci/run``, and only what such a machine cannot have may be missing.
"""

import os

import pytest

ALLOWED = ("no GPU", "runs as root", "no right to mount")
"""How the reasons of allowed skips begin."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    if forbidden_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if found := forbidden_skips(config):
        terminalreporter.section("skips that fail on a CI machine", red=True)
        for line in found:
            terminalreporter.line(line)


def forbidden_skips(config: pytest.Config) -> list[str]:
    """Skipped tests with their reasons, without the allowed ones; none where ``CI`` is not set."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return []
    found = []
    for report in reporter.stats.get("skipped", ()):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED):
            found.append(f"{report.nodeid}: {reason}")
    return found
