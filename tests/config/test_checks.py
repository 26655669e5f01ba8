"""Settings that cannot be, or contradict one another, are refused."""

import pytest

from mocov3_ds.config.checks import check_config
from mocov3_ds.config.parts import MocoConfig, ModelConfig
from mocov3_ds.config.run_config import Config
from mocov3_ds.recipes import parse


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(moco=MocoConfig(temperature=0)), "--moco.temperature 0 cannot be"),
        (Config(model=ModelConfig(drop_path=1.5)), "--model.drop_path 1.5 cannot be"),
        (Config(epochs=0), "--epochs 0 cannot be; it must be above 0"),
        (Config(epochs=30, warmup_epochs=40), "--warmup_epochs 40 cannot be; it must be 0 to 30"),
        (Config(keep_chunks=2), "--keep_chunks 2 has no effect without --chunk"),
        (
            Config(moco=MocoConfig(momentum=0.0, momentum_batch=256)),
            "--moco.momentum_batch 256 has no effect beside --moco.momentum 0",
        ),
        (Config(model=ModelConfig(fp8=True, sigma_reparam=True)), "--model.fp8 and --model.sigma"),
    ],
)
def test_contradictions_and_bad_numbers(config: Config, words: str) -> None:
    check_config(Config())
    with pytest.raises(ValueError, match=words):
        check_config(config)


def test_sizes_beyond_any_machine_are_refused_before_anything_is_built() -> None:
    for flag in ("model.depth", "model.dim", "views.image_size"):
        with pytest.raises(ValueError, match=f"--{flag} {10**30} cannot be; it must be 1 to"):
            parse([f"--{flag}", str(10**30)])
