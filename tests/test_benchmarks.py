import json
import subprocess
import sys

from conftest import REPO


def test_the_null_space_benchmark_measures_and_reports() -> None:
    done = subprocess.run(
        [sys.executable, REPO / "benchmarks/null_space.py", "--short"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((REPO / "benchmarks/results/short/null_space.json").read_text())
    state, *_, fit = written["comparisons"]
    # 64 columns instead of a square matrix, summed over projections of 2048 to 15360 outputs.
    assert 64 / 15360 < state["ratio"] < 64 / 2048 and state["verdict"] == "reached"
    assert min(fit["ours"], fit["theirs"], fit["low"]) > 0
    assert all(row["what"][:12] in done.stdout for row in written["comparisons"])
