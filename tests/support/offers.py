"""A catalog with a hidden pack and a hidden plan, which one arm of an experiment is offered."""

NOON = 1_796_040_000_000
"""2026-11-30T12:00:00Z."""
CATALOG = {
    "models": [{"id": "base", "price": {"input_per_1m": "1"}}],
    "plans": {
        "prepaid": {"kind": "prepaid"},
        "payg": {"kind": "pay_as_you_go", "credit_limit": "5"},
        "club": {"kind": "pay_as_you_go", "credit_limit": "9", "visibility": "hidden"},
    },
    "packs": {
        "small": {"price": "5", "grants": {"usd": "5"}},
        "trial": {"price": "1", "grants": {"usd": "2"}, "visibility": "hidden"},
    },
    "default_plan": "prepaid",
    "pricing": {
        "experiments": [
            {
                "id": "trial",
                "ends": "2026-12-01T00:00:00Z",
                "arms": [{"id": "control"}, {"id": "trial", "packs": ["trial"], "plans": ["club"]}],
            }
        ]
    },
}
