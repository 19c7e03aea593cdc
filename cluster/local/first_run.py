"""Makes the demo's models where the configuration wants them and they are not there yet.

Knows when that is; the making is the demo's own, in a process of its own, since it loads torch.
"""

import subprocess
import sys
from pathlib import Path

import yaml

from cluster import demo
from cluster.local import ray_node
from cluster.local.environment import inherited
from cluster.local.preflight import Obstacle, check_disk
from cluster.local.settings import Settings


def ensure_models(settings: Settings) -> None:
    """Make the demo models, with a progress bar, if this configuration serves them.

    Raises:
        Obstacle: they cannot be made.
    """
    if not _wants_demo(settings) or _are_fresh(settings.models):
        return
    check_disk(settings.config.parent)
    command = [sys.executable, "-W", "ignore", "-m", "cluster.demo.models", "--out", str(settings.models)]
    env = inherited() | ray_node.source_path() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, check=False)
    if done.returncode != 0:
        raise Obstacle(f"the demo models could not be made: `{' '.join(command)}` shows why")
    _stamp(settings.models).touch()


def _wants_demo(settings: Settings) -> bool:
    try:
        text = settings.config.read_text()
        config = yaml.safe_load(text)
        path = next(app["args"]["model"]["path"] for app in config["applications"] if app["name"] == "farebox")
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration):
        return False  # the check that follows says what is wrong with the file
    return (settings.config.parent / str(path)).is_relative_to(settings.models)


def _are_fresh(models: Path) -> bool:
    """Made, and not older than the text and recipe that they are made of."""
    stamp = _stamp(models)
    sources = (Path(demo.__path__[0], name) for name in ("models.py", "text.py"))
    return stamp.is_file() and all(source.stat().st_mtime <= stamp.stat().st_mtime for source in sources)


def _stamp(models: Path) -> Path:
    return models / "recipe.json"
