"""The configuration file on its way to Ray Serve: checked, and adapted to this machine.

As a program (``python -m cluster.local.configuration FILE OUT``) it checks a file and writes the result as JSON. The
supervisor does that in a process of its own, because the check loads torch, which would stay in memory.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TypedDict

import yaml

from billing.catalog.catalog import Catalog
from billing.store.connection import Durability
from cluster.checking.findings import CheckFailed
from cluster.errors import ClusterError
from cluster.local import children, ray_node
from cluster.local.children import Child
from cluster.local.environment import inherited
from cluster.local.settings import LOOPBACK, Settings
from cluster.local.state import Home, write_private
from cluster.serve_api import GATEWAY, REPLICA, ServeConfig
from deployments.gateway.catalog_holder import read_catalog

CHECK_TIMEOUT_S = 600.0
"""The check downloads adapters that have a URL."""


class ConfigurationError(ClusterError):
    """A configuration cannot be applied."""


class StoreOptions(TypedDict):
    """What a configuration says about its store: the arguments of ``billing.store.connection.connect``."""

    durability: Durability
    min_replicas_acked: int


def checked(settings: Settings) -> ServeConfig:
    """The configuration file with absolute paths, digests and this machine's ports.

    Raises:
        CheckFailed: the file has errors; the message has all of them.
    """
    from cluster.checking.check import resolve

    return adapted(resolve(settings.config), settings)


def begin_check(settings: Settings, home: Home) -> Child:
    """Start to check the configuration file in another process; ``end_check`` has the result."""
    (home.logs / "check.log").unlink(missing_ok=True)
    command = [sys.executable, "-m", "cluster.local.configuration", str(settings.config), str(home.checked)]
    return children.start("check", command, inherited() | ray_node.source_path(), home.path, home.logs / "check.log")


def end_check(check: Child, settings: Settings, home: Home) -> ServeConfig:
    """Wait for the check and return the same as ``checked``.

    Raises:
        ConfigurationError: the file has errors; the message has all of them.
    """
    try:
        exit_code = check.process.wait(CHECK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"checking {settings.config} took longer than {CHECK_TIMEOUT_S:g} s: `farebox check` shows where it waits"
        ) from None
    if exit_code != 0:
        log = check.log.read_text(errors="replace").strip()
        raise ConfigurationError(log or "the check of the configuration was killed: does this machine lack memory?")
    return adapted(json.loads(home.checked.read_text()), settings)


def adapted(config: ServeConfig, settings: Settings) -> ServeConfig:
    """The configuration with this machine's host and port, and with the folders of this farebox.

    Options of the command line win over ``http_options`` in the file; absolute folders in the file are kept.
    """
    home = Home(settings.home)
    changed = deepcopy(config)
    changed["http_options"] = (changed.get("http_options") or {}) | {"host": LOOPBACK, "port": settings.port}
    changed["proxy_location"] = "HeadOnly"
    for args in _args(changed):
        for name, folder in {"spool_dir": home.spool, "adapter_cache_dir": home.adapters}.items():
            if name in args and not Path(str(args[name])).is_absolute():
                args[name] = str(folder)
    return changed


def scaled(config: ServeConfig, replicas: int) -> ServeConfig:
    """The configuration with exactly this many LoRA replicas."""
    changed = deepcopy(config)
    deployment = _deployment(changed, REPLICA)
    if "autoscaling_config" in deployment:
        bounds = {"min_replicas": replicas, "max_replicas": replicas, "initial_replicas": replicas}
        deployment["autoscaling_config"] = deployment["autoscaling_config"] | bounds
    else:
        deployment["num_replicas"] = replicas
    return changed


def replica_options(config: ServeConfig) -> dict[str, object]:
    """What Ray reserves for each LoRA replica, as ``ray_actor_options`` says it."""
    return dict(_deployment(config, REPLICA).get("ray_actor_options") or {})


def catalog_of(config: ServeConfig) -> Catalog:
    """The catalog of a resolved configuration, as every gateway reads it."""
    return read_catalog(_deployment(config, GATEWAY).get("user_config") or {})


def store_options(config: object) -> StoreOptions:
    """``strict`` and no replicas, unless an application says otherwise. ``config`` may be anything that YAML holds."""
    arguments = list(_args(config))
    replicas = [n for args in arguments if isinstance(n := args.get("min_replicas_acked"), int)]
    is_trusted = any(args.get("durability") == "trusted" for args in arguments)
    return StoreOptions(durability="trusted" if is_trusted else "strict", min_replicas_acked=max(replicas, default=0))


def store_options_in(file: Path) -> StoreOptions:
    """The same for a file that was not checked; the defaults if it cannot be read."""
    try:
        return store_options(yaml.safe_load(file.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return store_options(None)


def _args(config: object) -> Iterator[dict[str, object]]:
    """The ``args`` of each application that has any."""
    applications = config.get("applications") if isinstance(config, Mapping) else None
    for app in applications if isinstance(applications, list) else []:
        args = app.get("args") if isinstance(app, Mapping) else None
        if isinstance(args, dict):
            yield args


def _deployment(config: ServeConfig, name: str) -> ServeConfig:
    for app in config["applications"]:
        for deployment in app.get("deployments", []):
            if deployment["name"] == name:
                found: ServeConfig = deployment
                return found
    raise ConfigurationError(f"the configuration has no deployment {name}: add it, see serve_config.yaml")


def main() -> None:
    """Check the file of argument 1 and write it to argument 2; exit with code 1 and every finding if it has errors."""
    from cluster.checking.check import resolve

    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        write_private(out, json.dumps(resolve(file)))
    except CheckFailed as error:
        print(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
