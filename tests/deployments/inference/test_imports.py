"""The parts of the engine that import no torch."""

import subprocess
import sys


def test_torch_not_imported_by_text_adapters_and_scheduling() -> None:
    shared = ("request", "text", "adapters", "fairness")
    native = ("settings", "sequence", "registry", "kv", "blocks", "scheduler", "output")
    names = [*shared, *(f"native.{name}" for name in native)]
    code = "".join(f"import deployments.inference.{name}; " for name in names)
    check = "import sys; assert not {'torch', 'transformers', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True, timeout=60)
