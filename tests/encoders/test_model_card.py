"""The README.md of an exported folder: recipe, metrics, and code that runs."""

from pathlib import Path
from typing import Any

import torch

from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.evaluation import results
from tests.encoders.test_export import images
from tests.evaluation.runs import SIZE, make_run


def test_the_card_tells_recipe_metrics_and_loading(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    results.record_result(
        run, "linear", "base", {"top1": 61.237, "encoder": "run (base encoder, step 7)"}
    )
    export_encoder(
        run,
        tmp_path / "out",
        describe_results=lambda weights: results.format_table(weights.path, weights.role),
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "| run (base encoder, step 7) | - | 61.24 % | - |" in card
    assert "tiny: global batch 256, 12 epochs, 2 of warm-up" in card
    assert "AdamW: lr 0.0015" in card
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"images": images(SIZE)}
    exec(code.replace('"model.safetensors"', f'"{tmp_path / "out/model.safetensors"}"'), names)
    assert torch.allclose(names["features"], load_encoder(run)(images(SIZE)), atol=1e-5)
    export_encoder(run, tmp_path / "other", role="momentum")
    assert "Not evaluated" in (tmp_path / "other/README.md").read_text()
