"""Stands in for a launcher with train.py behind it: a run of three steps without a network.

python fake_training.py TRAIN_PY FLAGS: a rate above 1 diverges, a rate of 0.5 fails once.
"""

import json
import sys
from pathlib import Path

flags = sys.argv[2:]
run = Path(flags[flags.index("--runs") + 1]) / flags[flags.index("--name") + 1]
rate = json.loads(flags[flags.index("--ds") + 1].partition("=")[2])["params"]["lr"]
run.mkdir(parents=True, exist_ok=True)
starts = run / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
(run / "config.json").write_text(json.dumps({"config": {"epochs": 1.5}}))
rows = [{"step": step, "epoch": step / 2, "loss": 3.0 - step + rate} for step in (1, 2, 3)]
if rate > 1:
    rows = rows[:1]
if rate == 0.5 and starts.read_text() == "x":
    rows = rows[:2]
rows[-1]["knn"] = 40.0 + rate
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
print(f"started {starts.read_text()}")
if rate > 1:
    print("train.py: error: the loss is nan", file=sys.stderr)
    sys.exit(3)
if len(rows) == 2:
    print("Traceback ...\ntrain.py: error: out of memory", file=sys.stderr)
    sys.exit(1)
