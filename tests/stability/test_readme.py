"""The Python of the chapter runs as it stands there."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "mocov3_ds/stability/README.md"


def test_the_python_of_the_chapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    rows = "".join(f"{s},{3 - s / 999},{8 if 300 < s < 400 else 40}\n" for s in range(1, 900))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/mine.csv").write_text("step,train/loss,knn\n" + rows)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "mine: 899 rows; loss = train/loss, step = step, knn = knn. " in printed
    first, last, depth = printed.splitlines()[1].split()
    assert 295 < int(first) < 310 and 395 < int(last) < 410 and 31 < float(depth) < 33
