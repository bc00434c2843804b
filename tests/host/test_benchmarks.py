"""The benchmark that loads through TriLoRA Loader and Adapter Stack runs, once on a small model."""

import os
import subprocess
import sys

from comfyui_trilora.benchmarks.installation import ROOT


def test_the_benchmark_of_loading_runs():
    command = [sys.executable, str(ROOT / "benchmarks" / "block_loading.py"), "--small", "--runs", "1", "--dtype", "fp16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0 and "| Adapter Stack |" in done.stdout, done.stdout + done.stderr[-2000:]
