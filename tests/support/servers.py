"""Servers that tests start besides the embedded one."""

from pathlib import Path

SYSTEM_REDIS = Path("/usr/bin/redis-server")
"""Where the system's own Redis lies, if there is one."""
