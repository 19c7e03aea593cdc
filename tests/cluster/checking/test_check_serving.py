"""How tokens travel and when replicas come and go is checked before it is deployed: Serve would only log it."""

import pytest

from tests.cluster.checking.test_check import Desk, desk

__all__ = ["desk"]


@pytest.mark.parametrize(
    ("old", "new", "where", "problem"),
    [
        ("max_body_kib: 1024", "token_transport: serve", "args > token_transport", "is gone: remove this line"),
        ("target_queued_tokens: 4000", "target_queued_tokens: 0", "policy > policy_kwargs", "at least 1, not 0"),
        ("target_queued_tokens: 4000", "target_tokens: 4000", "policy > policy_kwargs", "unexpected keyword argument"),
        ("target_queued_tokens: 4000", 'target_queued_tokens: "4000"', "policy > policy_kwargs", "whole number"),
        ("autoscaling:QueuedTokens", "autoscaling:Queue", "autoscaling_config", "'Queue'"),
        ("deployments.autoscaling:Q", "deployments.autoscale:Q", "autoscaling_config", "deployments.autoscale"),
    ],
)
def test_what_serve_would_only_log_is_refused(desk: Desk, old: str, new: str, where: str, problem: str) -> None:
    desk.edit(old, new)
    findings = [finding for finding in desk.check().findings if where in finding.where]
    assert any(problem in finding.problem for finding in findings), desk.check().findings
    assert not desk.check().is_right


def test_token_transport_of_former_configurations_accepted(desk: Desk) -> None:
    desk.edit("max_body_kib: 1024", "token_transport: socket")
    assert desk.check().is_right
