"""What the engine's parts may be used without."""

import subprocess
import sys


def test_text_adapters_and_scheduling_are_usable_without_torch() -> None:
    shared = ("request", "text", "adapters", "fairness")
    native = ("settings", "sequence", "slots", "kv", "blocks", "scheduler", "output")
    names = [*shared, *(f"native.{name}" for name in native)]
    code = "".join(f"import deployments.inference.{name}; " for name in names)
    check = "import sys; assert not {'torch', 'transformers', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=60)
