"""``python -m cluster.local.resolving FILE OUT``: checks a configuration and writes what may be sent to Serve.

A process of its own, since the check loads torch, which a supervisor would then keep for its whole life.
"""

import json
import sys
from pathlib import Path

from cluster.checking.check import resolve
from cluster.checking.findings import CheckFailed
from cluster.local.state import write_private


def main() -> None:
    """Exits with 1 and says every finding where the file is not right."""
    file, out = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        write_private(out, json.dumps(resolve(file)))
    except CheckFailed as error:
        print(error)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
