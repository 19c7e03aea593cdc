"""``REDIS_URL`` is read in each of its forms."""

import pytest

from billing.store.address import Node, Shape, parse
from billing.store.errors import StoreRefused


@pytest.mark.parametrize(
    ("url", "shape", "nodes", "service"),
    [
        ("redis://h", Shape.SINGLE, [("h", 6379)], ""),
        ("rediss://u:p%40@h:1/2", Shape.SINGLE, [("h", 1)], ""),
        ("unix:///run/s.sock", Shape.SINGLE, [], ""),
        ("redis+sentinel://a:1,b/ledger", Shape.SENTINEL, [("a", 1), ("b", 26379)], "ledger"),
        ("rediss+sentinel://u:p@a,b/ledger/3?ssl_ca_certs=/ca", Shape.SENTINEL, [("a", 26379), ("b", 26379)], "ledger"),
        ("redis+cluster://:p@a:1,b", Shape.CLUSTER, [("a", 1), ("b", 6379)], ""),
    ],
)
def test_address_has_shape_nodes_and_service(
    url: str, shape: Shape, nodes: list[tuple[str, int]], service: str
) -> None:
    address = parse(url)
    assert (address.shape, list(address.nodes), address.service) == (shape, [Node(*n) for n in nodes], service)


def test_address_has_logins_of_store_and_sentinels() -> None:
    address = parse("redis+sentinel://u:p@a/ledger/3?sentinel_password=s&ssl_check_hostname=false")
    assert (address.options["username"], address.options["password"], address.options["db"]) == ("u", "p", 3)
    assert address.sentinel_options == {"password": "s", "ssl_check_hostname": False}
    assert "sentinel_password" not in address.options


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@h",
        "redis+sentinel://:secret@h",
        "redis+cluster://:secret@h/0",
        "redis+cluster://:secret@",
        "redis://:secret@h:port",
        "redis+http://:secret@h",
        "unix+cluster://:secret@h",
        "",
    ],
)
def test_unknown_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreRefused, match="its forms are") as refusal:
        parse(url)
    assert "secret" not in str(refusal.value)
