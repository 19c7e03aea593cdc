"""Servers that tests start besides the embedded one."""

from pathlib import Path

SYSTEM_REDIS = Path("/usr/bin/redis-server")
"""Where Debian and Ubuntu install redis-server."""
