"""Each model of other programs gives its owner's features here, or is refused by name."""

import pytest

from mocov3_ds.bench.foreign_weights import ForeignOptions, compare_models, run_bench

PLAIN = {
    "timm vit_tiny_patch16_224",
    "timm vit_small_patch16_224",
    "timm vit_base_patch16_224",
    "timm deit_small_patch16_224",
    "timm vit_base_patch16_224_miil",
    "timm vit_small_patch16_224, qk_norm=True",
    "transformers ViT",
    "transformers ViT, qkv_bias=False",
    "transformers ViT, layer_norm_eps=0.01",
    "transformers ViTMAE, mask_ratio=0.0",
    "transformers ViTMSN",
}
UNSEEN = {"timm vit_small_patch16_224, act_layer=relu", "transformers ViT, hidden_act=relu",
          "transformers ViT, layer_norm_eps=0.01"}  # fmt: skip
"""models whose weights alone do not tell what they compute"""


def test_one_of_each_kind() -> None:
    (plain,) = compare_models(ForeignOptions(only="vit_tiny", images=2))
    assert float(plain.folder) > 0.99999
    assert float(plain.file) > 0.99999
    (other,) = compare_models(ForeignOptions(only="reg4_dinov2", images=2))
    assert float(other.folder) > 0.99999  # its config.json says which model of timm it is
    assert "reg_token" in other.file


@pytest.mark.slow
def test_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {outcome.name: outcome for outcome in compare_models(ForeignOptions())}
    assert len(outcomes) == 30
    for name, outcome in outcomes.items():
        if name in PLAIN or name.startswith("timm "):
            assert float(outcome.folder) > 0.99999, outcome
        else:
            with pytest.raises(ValueError, match="could not convert"):
                float(outcome.folder)
        if name not in UNSEEN and outcome.file[0] in "01" and outcome.file[1] == ".":
            assert float(outcome.file) > 0.9999, outcome
    run_bench(ForeignOptions(only="vit_tiny"))
    assert "| timm vit_tiny_patch16_224 | 1.000000 | 1.000000 |" in capsys.readouterr().out
