"""Virtual token counters: the service of idle and of new fairness keys."""

from deployments.inference.fairness import MAX_IDLE_KEYS, TokenCounters


def test_paused_key_saves_up_no_service() -> None:
    counters = TokenCounters()
    counters.enter("busy")
    counters.charge("busy", prompt_tokens=1000)
    counters.enter("new")
    assert counters.served("new") == 1000
    counters.leave("new")
    counters.charge("busy", prompt_tokens=1000)
    counters.enter("new")
    assert counters.served("new") == 2000


def test_idle_key_keeps_its_service_and_idle_keys_are_bounded() -> None:
    counters = TokenCounters()
    counters.enter("steady")
    counters.enter("greedy")
    counters.charge("greedy", prompt_tokens=500)
    counters.leave("greedy")
    counters.enter("greedy")
    assert counters.served("greedy") == 500
    for i in range(3 * MAX_IDLE_KEYS):
        counters.enter(str(i))
        counters.leave(str(i))
    assert len(counters._served) <= MAX_IDLE_KEYS + 3
