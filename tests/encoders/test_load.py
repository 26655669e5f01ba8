"""Encoders read from all that others and we have written; clear sentences for what cannot be read.

The layouts of other programs are written here by hand, from their public names, beside a plain
forward pass that knows only the published layout.
"""

import argparse
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import mocov3_ds
from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.foreign_names import to_transformers
from mocov3_ds.encoders.load import build_encoder, load_encoder, positions_for, read_weights
from mocov3_ds.model.vit import VitShape, build_vit, sincos_positions
from tests.evaluation.runs import DIM, HEADS, SIZE, make_run
from tests.ranks_pool import run_ranks

SHAPE = VitShape(image_size=SIZE, patch_size=4, dim=DIM, depth=2, heads=HEADS)
IMAGES = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def backbone(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    vit = build_vit(SHAPE)
    for parameter in vit.parameters():  # biases and norms away from 0 and 1
        parameter.data += 0.02 * torch.randn_like(parameter)
    return vit.eval()


BASE, MOMENTUM = backbone(0), backbone(1)


def plain_features(state: dict[str, Tensor], heads: int, images: Tensor) -> Tensor:
    """The forward pass of a ViT in the published MoCo v3 layout, one operation a line."""
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    count, depth = len(images), 1 + max(int(n.split(".")[1]) for n in state if "blocks." in n)
    x = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(count, 1, dim), x], dim=1) + state["pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), state[name + ".weight"], state[name + ".bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    for i in range(depth):
        block = f"blocks.{i}."
        q, k, v = linear(norm(x, block + "norm1"), block + "attn.qkv").chunk(3, dim=2)
        outputs = []
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / (dim // heads) ** 0.5
            outputs.append(scores.softmax(2) @ v[..., part])
        x = x + linear(torch.cat(outputs, dim=2), block + "attn.proj")
        hidden = F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1"))
        x = x + linear(hidden, block + "mlp.fc2")
    return norm(x, "norm")[:, 0]


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def published() -> dict[str, Any]:
    """The published code's file: two encoders with heads, optimizer, epoch."""
    state = prefixed("module.base_encoder.", BASE) | prefixed("module.momentum_encoder.", MOMENTUM)
    for encoder in ("base_encoder.head", "momentum_encoder.head", "predictor"):
        state[f"module.{encoder}.0.weight"] = torch.ones(8, DIM)
        state[f"module.{encoder}.1.running_mean"] = torch.ones(8)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1}]}
    return {"epoch": 300, "arch": "vit_small", "state_dict": state, "optimizer": optimizer}


def mmpretrain(module: nn.Module, prefix: str, norm: str) -> dict[str, Tensor]:
    names = {"patch_embed.proj.": "patch_embed.projection.", "mlp.fc1.": "ffn.layers.0.0.",
             "mlp.fc2.": "ffn.layers.1.", "blocks.": "layers."}  # fmt: skip
    renamed = {}
    for name, tensor in module.state_dict().items():
        new = name
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        new = new.replace("norm1.", f"{norm}1.").replace("norm2.", f"{norm}2.")
        renamed[prefix + (f"{norm}1." + new[5:] if new.startswith("norm.") else new)] = tensor
    return renamed


def same(path: Path, module: nn.Module, which: Any = "base", heads: int = HEADS) -> None:
    with torch.no_grad():
        ours = load_encoder(path, which, heads=heads)(IMAGES)
        torch.testing.assert_close(ours, module(IMAGES), atol=1e-5, rtol=1e-5)


def test_the_plain_forward_agrees() -> None:
    with torch.no_grad():
        plain = plain_features(BASE.state_dict(), HEADS, IMAGES)
        torch.testing.assert_close(plain, BASE(IMAGES), atol=1e-5, rtol=1e-5)


def test_published_files(tmp_path: Path) -> None:
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save(published(), path)
    same(path, BASE)
    same(path, MOMENTUM, "momentum")
    probe = prefixed("module.", BASE) | {"module.head.weight": torch.zeros(10, DIM)}
    torch.save({"state_dict": probe}, tmp_path / "linear.pth.tar")
    same(tmp_path / "linear.pth.tar", BASE)


@pytest.mark.parametrize("norm", ["ln", "norm"])
def test_mmpretrain_files(tmp_path: Path, norm: str) -> None:
    state = mmpretrain(BASE, "backbone.", norm)
    state |= mmpretrain(MOMENTUM, "momentum_encoder.module.0.", norm)
    state["momentum_encoder.module.1.fc0.weight"] = torch.ones(8, DIM)
    state["momentum_encoder.steps"] = torch.tensor(9)
    state["neck.fc0.weight"] = torch.ones(8, DIM)
    path = tmp_path / "mocov3.pth"
    torch.save({"meta": {"epoch": 300}, "state_dict": state}, path)
    same(path, BASE)
    same(path, MOMENTUM, "momentum")


def test_deit_timm_and_transformers_files(tmp_path: Path) -> None:
    torch.save({"model": BASE.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    same(tmp_path / "a.pth", BASE)
    torch.save(BASE.state_dict(), tmp_path / "b.pth")
    same(tmp_path / "b.pth", BASE)
    save_file(BASE.state_dict(), str(tmp_path / "c.safetensors"), metadata={"num_heads": "4"})
    same(tmp_path / "c.safetensors", BASE, heads=0)
    half = {f"vit.{n}": t.half() for n, t in to_transformers(BASE.state_dict()).items()}
    (tmp_path / "hf").mkdir()
    save_file(half, str(tmp_path / "hf/model.safetensors"))
    (tmp_path / "hf/config.json").write_text('{"model_type": "vit", "num_attention_heads": 4}')
    loaded = load_encoder(tmp_path / "hf")
    assert loaded.blocks[0].attn.num_heads == 4
    for name, tensor in BASE.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


def test_our_own_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    weights = read_weights(run)
    assert weights.title == "run (base encoder, step 7)"
    assert weights.shape == SHAPE
    base, momentum = load_encoder(run), load_encoder(run, "momentum")
    saved = weights.saved
    assert saved is not None
    for which, encoder in (("base", base), ("momentum", momentum)):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, saved.read_tensor(which, f"backbone.{name}"))
    assert not torch.equal(base.cls_token, momentum.cls_token)
    assert not base.training
    one = load_encoder(run / "checkpoints/step-00000007", "momentum")
    assert torch.equal(one.norm.weight, momentum.norm.weight)
    assert load_encoder(run / "checkpoints").norm.weight.equal(base.norm.weight)
    assert mocov3_ds.load_encoder is load_encoder


def test_torch_is_imported_when_an_encoder_is_loaded() -> None:
    code = "import sys, mocov3_ds; print('torch' in sys.modules); mocov3_ds.load_encoder; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'load_decoder'"):
        mocov3_ds.load_decoder  # noqa: B018


def write_zero_folders(folder: Path) -> list[float]:
    """Train one step at each ZeRO stage and let DeepSpeed save; features of the fp32 weights."""
    import deepspeed

    from mocov3_ds.distributed.engine import full_tensors

    # skips a long compilation of a collective that only inference uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sums = []
    for stage in (0, 1, 2, 3):
        torch.manual_seed(0)
        model = nn.ModuleDict({"base_encoder": build_vit(SHAPE)})
        config = {
            "train_batch_size": 2,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=trained)
        engine.backward(engine.module["base_encoder"](IMAGES[:1]).square().mean())
        engine.step()
        state = {"args": argparse.Namespace(out=Path("x")), "best": np.float64(1)}
        engine.save_checkpoint(str(folder / f"{stage}"), client_state=state)
        sums.append(sum(float(t.double().sum()) for _, t in full_tensors(engine.module)))
    ranks.barrier()
    return sums


def test_deepspeed_folders_of_each_stage(tmp_path: Path) -> None:
    (sums, _) = run_ranks(2, write_zero_folders, tmp_path)
    images = {}
    for stage, expected in enumerate(sums):
        folder = tmp_path / f"{stage}"
        encoder = load_encoder(folder, heads=HEADS)
        assert sum(float(t.double().sum()) for t in encoder.state_dict().values()) == pytest.approx(
            expected, abs=1e-4
        )
        images[stage] = encoder(IMAGES)
        torch.testing.assert_close(images[stage], images[0], atol=1e-4, rtol=1e-4)
        assert (images[stage] - build_vit(SHAPE)(IMAGES)).abs().max() > 1e-2
    same(tmp_path / "1/global_step1", load_encoder(tmp_path / "1", heads=HEADS))
    gone = sorted((tmp_path / "2/global_step1").glob("*rank_1*optim_states.pt"))[0]
    gone.unlink()
    with pytest.raises(ValueError, match="DeepSpeed checkpoint that cannot be read: Expected 2"):
        load_encoder(tmp_path / "2")
    for file in (tmp_path / "0/global_step1").glob("*_model_states.pt"):
        torch.save({"module": {"w": torch.zeros(1)}, "x": Code()}, file)
    with pytest.raises(
        ValueError, match=r"cannot be read: .* \('builtins.*deepspeed\.utils\.zero_"
    ):
        load_encoder(tmp_path / "0")
    assert not RAN


RAN: list[int] = []


class Code:
    """Something whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return RAN.append, (1,)


def test_no_pickled_code_runs(tmp_path: Path) -> None:
    path = tmp_path / "bad.pth"
    torch.save({"state_dict": BASE.state_dict(), "x": Code()}, path)
    with pytest.raises(ValueError, match="pickled objects besides tensors"):
        load_encoder(path)
    with path.open("wb") as file:
        pickle.dump({"x": Code()}, file)
    with pytest.raises(ValueError, match="gives no encoder"):
        load_encoder(path)
    assert not RAN


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    def refuses(path: Path, sentence: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=sentence) as caught:
            load_encoder(path, **options)
        assert "\n" not in str(caught.value)

    refuses(tmp_path / "nothing", "there is no")
    refuses(tmp_path, "it is no run")
    whole = tmp_path / "whole.pth"
    torch.save(BASE.state_dict(), whole)
    refuses(whole, "width 32 do not tell the number of attention heads; give --heads")
    refuses(whole, "32 must be a multiple of the 5 heads", heads=5)
    refuses(whole, "no momentum encoder; class tokens stand below ''", which="momentum")
    refuses(whole, "image size 18 is not a multiple", heads=4, image_size=18)
    refuses(whole, "image size -4 is no side of an image", heads=4, image_size=-4)
    refuses(whole, "at most 16384", heads=4, image_size=10**9)
    refuses(whole, "--heads -2 is no number", heads=-2)
    for change, sentence in (
        (lambda t: t.to(torch.int8), "norm.weight holds int8"),
        (lambda t: t.to("meta"), "no content"),
        (lambda t: t / torch.arange(DIM), "1 of 32 numbers of norm.weight are not finite"),
    ):
        state = BASE.state_dict()
        torch.save({**state, "norm.weight": change(state["norm.weight"])}, tmp_path / "odd.pth")
        refuses(tmp_path / "odd.pth", sentence, heads=HEADS)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:5000])
    refuses(cut, "no torch file, or a truncated one")
    (tmp_path / "text.pth").write_text("hello")
    refuses(tmp_path / "text.pth", "no torch file")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    refuses(tmp_path / "cut.safetensors", "no complete safetensors file")
    torch.save([1], tmp_path / "list.pth")
    refuses(tmp_path / "list.pth", "holds a list, not weights by name")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    refuses(tmp_path / "other.pth", "no Vision Transformer with a class token.*fc.weight")
    missing = {n: t for n, t in BASE.state_dict().items() if "blocks.1.mlp" not in n}
    torch.save(missing, tmp_path / "missing.pth")
    missing = {n: t for n, t in BASE.state_dict().items() if "qkv.bias" not in n}
    torch.save(missing, tmp_path / "unbiased.pth")
    for name, tensor in (("pos_embed", torch.zeros(3)), ("patch_embed.proj.weight", torch.ones(2)),
                         ("blocks.0.norm1.bias", torch.ones(2, 2))):  # fmt: skip
        torch.save({**BASE.state_dict(), name: tensor}, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=r"odd\.pth"):
            load_encoder(tmp_path / "odd.pth", heads=HEADS)
    refuses(tmp_path / "unbiased.pth", r"2 weights .* says so \(qkv_bias false\) in a config\.json")
    refuses(tmp_path / "missing.pth", r"4 weights .* are missing .*blocks\.1\.mlp\.fc1\.bias")
    torch.save({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "empty.pth")
    refuses(tmp_path / "empty.pth", "no transformer blocks")
    stem = prefixed("", BASE) | {"patch_embed.proj.0.weight": torch.zeros(1)}
    torch.save(stem, tmp_path / "conv.pth")
    refuses(tmp_path / "conv.pth", "convolutional stem")
    run = make_run(tmp_path / "run")
    refuses(run, "run has 4 attention heads; leave out --heads 8", heads=8)
    (run / "checkpoints/step-00000007/base-0.safetensors").write_bytes(b"half")
    refuses(run / "checkpoints/step-00000007", "is a damaged checkpoint")
    refuses(run, "holds no complete checkpoint")


def test_other_sizes() -> None:
    torch.manual_seed(0)
    vit = build_vit(SHAPE).eval()
    large = sincos_positions((6, 3), DIM)
    assert torch.equal(positions_for(vit.pos_embed.half(), (6, 3), (4, 4)), large)
    learned = torch.randn(1, 17, DIM)
    resampled = positions_for(learned, (6, 3), (4, 4))
    assert resampled.shape == (1, 19, DIM)
    assert torch.equal(resampled[:, 0], learned[:, 0])
    assert positions_for(learned, (4, 4), (4, 4)) is learned


def test_a_built_encoder_has_its_own_weights(tmp_path: Path) -> None:
    torch.save(BASE.state_dict(), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth", heads=HEADS)
    build_encoder(weights).norm.weight.data.zero_()
    assert build_encoder(weights).norm.weight.any()


HOMELESS = {
    "blocks.0.ls1.gamma": "LayerScale",
    "blocks.1.attn.norm.weight": "a norm that it has not",
    "blocks.1.mlp.norm.weight": "a norm that it has not",
    "blocks.0.mlp.w12.weight": "a gated MLP",
    "blocks.0.attn.q_bias": "",
    "blocks.0.attn.relative_position_bias_table": "relative positions",
    "reg_token": "register tokens",
    "dist_token": "a distillation token",
    "rope.freqs": "rotary positions",
    "norm_pre.weight": "a norm that it has not",
    "fc_norm.weight": "mean of the patches",
    "attn_pool.latent": "attention pooling",
    "anything.else": "",
    "blocks.0.attn.qkv.lora_A.default.weight": "merge them first",
}


@pytest.mark.parametrize("name", HOMELESS)
@pytest.mark.parametrize("prefix", ["", "module.base_encoder."])
def test_no_tensor_of_the_backbone_is_dropped(tmp_path: Path, name: str, prefix: str) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": prefixed(prefix, BASE) | {prefix + name: torch.ones(DIM)}}, path)
    with pytest.raises(ValueError, match=f"has no place .*: {name}") as caught:
        load_encoder(path, heads=HEADS)
    assert HOMELESS[name] in str(caught.value)


def test_what_is_left_out_and_guessed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(published(), tmp_path / "a.pth")
    load_encoder(tmp_path / "a.pth", heads=HEADS)
    for words in ("left out: ", "module.base_encoder.head (2)", "module.momentum_encoder (32)",
                  "module.predictor (2)", "optimizer (1)"):  # fmt: skip
        assert words in caplog.text
    assert "nothing tells" not in caplog.text
    caplog.clear()
    vit = build_vit(VitShape(image_size=16, patch_size=8, dim=384, depth=1, heads=12))
    torch.save(vit.state_dict(), tmp_path / "s.pth")
    load_encoder(tmp_path / "s.pth")
    assert "12 assumed, MoCo v3's for width 384, 6 (DeiT, DINO, timm) is as likely" in caplog.text
    assert "--heads decides" in caplog.text
