"""``farebox check`` of the autoscaling policy and the token transport, whose errors Ray Serve only logs."""

import pytest

from tests.support.configuration import Workspace


@pytest.mark.parametrize(
    ("old", "new", "where", "problem"),
    [
        ("token_transport: socket", "token_transport: pigeon", "args > token_transport", "'socket' or 'serve'"),
        ("target_queued_tokens: 4000", "target_queued_tokens: 0", "policy > policy_kwargs", "at least 1, not 0"),
        ("target_queued_tokens: 4000", "target_tokens: 4000", "policy > policy_kwargs", "unexpected keyword argument"),
        ("target_queued_tokens: 4000", 'target_queued_tokens: "4000"', "policy > policy_kwargs", "whole number"),
        ("autoscaling:QueuedTokens", "autoscaling:Queue", "autoscaling_config", "'Queue'"),
        ("deployments.autoscaling:Q", "deployments.autoscale:Q", "autoscaling_config", "deployments.autoscale"),
    ],
)
def test_errors_that_serve_only_logs_are_found(
    workspace: Workspace, old: str, new: str, where: str, problem: str
) -> None:
    workspace.edit(old, new)
    findings = [finding for finding in workspace.check().findings if where in finding.where]
    assert any(problem in finding.problem for finding in findings), workspace.check().findings
    assert not workspace.check().is_valid


def test_serve_transport_is_allowed(workspace: Workspace) -> None:
    workspace.edit("token_transport: socket", "token_transport: serve")
    assert workspace.check().is_valid
