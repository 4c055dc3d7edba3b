"""Small disks that a test fills or makes read-only.  Mounting them needs root on Linux."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def may_mount() -> str:
    """Why not, or nothing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "mounting a small disk needs root on Linux"
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True)
    return "" if done.returncode == 0 else "no disk can be mounted here"


WHY_NOT = may_mount()
needs_root = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
