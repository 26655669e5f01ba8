"""The README's lines for Transformers' Trainer, run as they stand, on one rank."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.optim import Lamb
from tests.optim import engines
from tests.ranks_pool import run_ranks

STEPS = 6


class Classifier(nn.Module):
    """What the Trainer asks of a model: a loss beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.leave(torch.tanh(self.enter(x)))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def train_by_readme(folder: str) -> list[Any]:
    """Steps, names of the signals and weights of a run, and of one that was resumed half-way."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    engines.quiet()
    readme = (Path(__file__).parents[2] / "mocov3_ds/optim/README.md").read_text()
    (code,) = re.findall(r"<!-- trainer example -->\n```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {"Trainer": Trainer, "TrainerCallback": TrainerCallback, "Lamb": Lamb}
    exec(code, names)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {"x": torch.randn(5, generator=generator), "labels": torch.tensor(i % 3)} for i in range(24)
    ]
    seen = []
    for resumed in (None, f"{folder}/checkpoint-{STEPS // 2}"):
        arguments: dict[str, Any] = {"max_steps": STEPS, "save_steps": STEPS // 2}
        arguments |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
        arguments["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        torch.manual_seed(1)
        trainer = names["LambTrainer"](
            Classifier(),
            TrainingArguments(
                folder,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                learning_rate=0.1,
                **arguments,
            ),
            train_dataset=samples,
        )
        trainer.train(resume_from_checkpoint=resumed)
        weights = {n: s["weight"] for n, s in trainer.lamb.full_state("weight")}
        seen.append((trainer.lamb.step_count, list(trainer.lamb.signals().rows()), weights))
    return seen


@pytest.mark.slow
def test_the_trainer_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    ((whole, resumed),) = run_ranks(1, train_by_readme, str(tmp_path), timeout=600)
    torch.manual_seed(1)
    first = dict(Classifier().named_parameters())
    for steps, names, weights in (whole, resumed):
        assert steps == STEPS and set(names) == {*first}
        assert all(torch.equal(weights[name], whole[2][name]) for name in first)
    assert all(not torch.equal(whole[2][name], first[name]) for name in first)
