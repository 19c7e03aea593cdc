"""One whole farebox for all end-to-end tests, and the demo models that it serves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.demo_models import demo_models
from tests.support.stack import REPO, Stack, running


@pytest.fixture(scope="session")
def models() -> Path:
    return demo_models()


@pytest.fixture(scope="session")
def config(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped configuration with absolute paths and one LoRA replica, in a folder that tests may write to."""
    raw = yaml.safe_load((REPO / "serve_config.yaml").read_text().replace(".farebox/models", str(models)))
    replica = raw["applications"][0]["deployments"][1]
    replica["autoscaling_config"]["max_replicas"] = 1  # only where a test asks for more
    path = tmp_path_factory.mktemp("config") / "serve_config.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.fixture(scope="package")
def stack(config: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("fb"), config, models) as up:
        yield up
