"""A slow machine ends its tests in time: what it does not come to is skipped, and named."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_test_is_begun_when_time_is_over() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1"]
    command += ["--begin-until", str(time.time() - 1), "tests/settings/test_wording.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "1 skipped" in done.stdout, done.stdout + done.stderr
    assert "no time left (--begin-until)" in done.stdout
