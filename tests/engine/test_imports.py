"""What the engine's parts may be used without."""

import subprocess
import sys
from pathlib import Path


def test_text_adapters_and_scheduling_are_usable_without_torch() -> None:
    names = (
        "request",
        "settings",
        "text",
        "adapters",
        "sequence",
        "slots",
        "fairness",
        "kv",
        "blocks",
        "scheduler",
        "output",
    )
    code = "".join(f"import deployments.engine.{name}; " for name in names)
    check = "import sys; assert not {'torch', 'transformers', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=60)


def test_no_file_of_the_engine_imports_ray_or_the_rest_of_the_house(repo: Path) -> None:
    for file in (repo / "deployments" / "engine").glob("*.py"):
        for line in file.read_text().splitlines():
            if line.lstrip().startswith(("import ", "from ")) and "deployments" in line:
                assert "deployments.engine" in line, (file, line)
            assert not line.lstrip().startswith(
                ("import ray", "from ray", "import redis", "from billing", "import peft")
            )
