"""What a start adds for the demo: its models, if the configuration serves them, and its tenants."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import yaml

from cluster import demo
from cluster.demo.tenants import create_tenants
from cluster.local import ray_node
from cluster.local.environment import OperatorEnvironment, inherited
from cluster.local.preflight import PreflightError, check_disk
from cluster.local.settings import Settings
from cluster.local.state import Home, Secrets, write_private


def ensure_models(settings: Settings) -> None:
    """Make the demo models, with a progress bar, if this configuration serves them and they are missing or outdated.

    They are made in another process, because that loads torch.

    Raises:
        PreflightError: they cannot be made.
    """
    models = settings.models_folder
    if not _serves_demo(settings, models) or _are_current(models):
        return
    check_disk(settings.config.parent)
    command = [sys.executable, "-W", "ignore", "-m", "cluster.demo.models", "--out", str(models)]
    env = inherited() | ray_node.source_path() | {"HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, env=env, check=False).returncode != 0:
        raise PreflightError(f"the demo models could not be made: run `{' '.join(command)}` to see why")
    _stamp(models).touch()


def _serves_demo(settings: Settings, models: Path) -> bool:
    try:
        config = yaml.safe_load(settings.config.read_text())
        path = next(app["args"]["model"]["path"] for app in config["applications"] if app["name"] == "farebox")
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration):
        return False  # the check of the file follows and reports what is wrong
    return (settings.config.parent / str(path)).is_relative_to(models)


def _are_current(models: Path) -> bool:
    """Whether they were made, and after the last change of the text and the recipe."""
    stamp = _stamp(models)
    sources = (Path(demo.__path__[0], name) for name in ("models.py", "text.py"))
    return stamp.is_file() and all(source.stat().st_mtime <= stamp.stat().st_mtime for source in sources)


def _stamp(models: Path) -> Path:
    return models / "recipe.json"


def ensure_tenants(settings: Settings, home: Home, secrets: Secrets) -> None:
    """Create the demo's tenants over the running API, and write their keys to ``demo.json``.

    Raises:
        DemoTenantError: one could not be created.
    """
    admin_key = OperatorEnvironment.read().farebox_admin_key or secrets.admin_key
    tenants = asyncio.run(create_tenants(settings.api_url, admin_key, settings.sandbox_url, _earlier_keys(home)))
    content = {
        "base_url": settings.api_url,
        "admin_key": admin_key,
        "dodo_sandbox_url": settings.sandbox_url,
        "webhook_secret": secrets.webhook_secret,
        "tenants": {
            name: {"api_key": t.api_key, "plan": t.plan, "dodo_customer_id": t.dodo_customer_id}
            for name, t in tenants.items()
        },
    }
    write_private(home.demo, json.dumps(content, indent=2))


def _earlier_keys(home: Home) -> dict[str, str]:
    """The API keys of an earlier run by tenant, so that a restart leaves them valid."""
    try:
        return {name: tenant["api_key"] for name, tenant in json.loads(home.demo.read_text())["tenants"].items()}
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return {}
