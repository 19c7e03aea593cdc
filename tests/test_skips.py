"""A CI machine that lacks something a test needs fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MISSING, NO_GPU = "needs redis-server", "no GPU"


def run_a_skipped_test(folder: Path, repo: Path, reason: str, is_ci: bool, *options: str) -> tuple[int, str]:
    test = folder / "test_skipped.py"
    test.write_text(f"import pytest\n\n\n@pytest.mark.skip(reason={reason!r})\ndef test_one() -> None: ...\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "tests.support.skips", *options, str(test)],
        env={**os.environ, "PYTHONPATH": str(repo), "CI": "true" if is_ci else ""},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one process", "workers"])
def test_skip_fails_a_ci_run(tmp_path: Path, repo: Path, options: tuple[str, ...]) -> None:
    code, output = run_a_skipped_test(tmp_path, repo, MISSING, True, *options)
    assert code == 1
    assert f"test_skipped.py::test_one: {MISSING}" in output


@pytest.mark.parametrize(("reason", "is_ci"), [(MISSING, False), (NO_GPU, True)])
def test_skip_passes_off_ci_or_when_allowed(tmp_path: Path, repo: Path, reason: str, is_ci: bool) -> None:
    assert run_a_skipped_test(tmp_path, repo, reason, is_ci)[0] == 0
