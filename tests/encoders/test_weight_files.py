"""Folders of other programs: shards, universal checkpoints; what is there is said."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mocov3_ds.encoders.load import load_encoder
from mocov3_ds.encoders.weight_files import check_readable, find_weights
from tests.encoders.test_load import BASE, HEADS, MOMENTUM, prefixed, same
from tests.evaluation.runs import make_run


def refuses(path: Path, sentence: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        load_encoder(path, heads=HEADS, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path: Path, kind: str) -> None:
    tensors, places = dict(BASE.state_dict()), dict[str, str]()
    stem, ending = kind.split(".")
    names = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for number, name in enumerate(names):
        part = {n: t for i, (n, t) in enumerate(sorted(tensors.items())) if i % 2 == number}
        places |= dict.fromkeys(part, name)
        save_file(part, tmp_path / name) if ending == "safetensors" else torch.save(
            part, tmp_path / name
        )
    index = tmp_path / f"{kind}.index.json"

    def write(places: Any) -> None:
        index.write_text(json.dumps({"weight_map": places}))

    write(places)
    same(tmp_path, BASE)
    refuses(tmp_path / names[0], r"missing below ''|has no place")
    write({**places, "gone": names[1]})
    refuses(tmp_path, f"{names[1]} lacks 'gone'")
    write({**places, "a": "../a.bin"})
    refuses(tmp_path, r"names the file '\.\./a\.bin', which is not beside it")
    write([1])
    refuses(tmp_path, "no weight_map")
    write(places)
    (tmp_path / names[1]).unlink()
    refuses(tmp_path, f"names the file '{names[1]}', which is not beside it")


def write_universal(folder: Path) -> None:
    """As ds_to_universal does: fp32 masters by name, and a bf16 copy at ZeRO-1."""
    for name, tensor in BASE.state_dict().items():
        place = folder / "zero" / f"base_encoder.{name}"
        place.mkdir(parents=True)
        torch.save({"cat_dim": 0, "param": tensor} if "norm" in name else tensor, place / "fp32.pt")
        torch.save(torch.zeros(2), place / "exp_avg.pt")
    module = {n: t.bfloat16() for n, t in prefixed("base_encoder.", BASE).items()}
    torch.save({"module": module, "epoch": 3}, folder / "mp_rank_00_model_states.pt")


def test_universal_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "step_universal"
    write_universal(folder)
    loaded = load_encoder(folder, heads=HEADS).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in BASE.state_dict().items())
    (tmp_path / "latest_universal").write_text("step_universal\n")
    same(tmp_path, BASE)
    (folder / "mp_rank_00_model_states.pt").unlink()  # stage 3: a file for each rank
    frozen = prefixed("momentum_encoder.", MOMENTUM)
    trained = BASE.state_dict()
    for name, tensor in trained.items():  # which leaves the masters flat, and padded
        flat = torch.cat([tensor.flatten(), torch.zeros(3)])
        torch.save(flat, folder / f"zero/base_encoder.{name}/fp32.pt")
    for rank in (0, 1):
        fragments = {}
        for name, tensor in frozen.items():
            flat = torch.cat([tensor.flatten(), torch.zeros(tensor.numel() % 2)])
            fragments[name] = flat.chunk(2)[rank].clone()
        states = {"module": {"m.count": torch.ones(1)}, "buffer_names": ["m.count"],
                  "frozen_param_shapes": {n: t.shape for n, t in frozen.items()},
                  "frozen_param_fragments": fragments,
                  "param_shapes": [{f"base_encoder.{n}": t.shape for n, t in trained.items()}],
                 }  # fmt: skip
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    same(folder, BASE)
    same(folder, MOMENTUM, "momentum")
    assert "m.count" in find_weights(folder).tensors
    (folder / "zero/base_encoder.norm.bias/fp32.pt").unlink()
    refuses(folder, r"zero/base_encoder\.norm\.bias holds no fp32\.pt; .* not whole")
    (tmp_path / "latest_universal").write_text("../elsewhere")
    refuses(tmp_path, r"names '\.\./elsewhere', which is no folder in it")


def test_what_is_there_is_said(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "args": {"a": 1}}, tmp_path / "empty.pth")
    refuses(tmp_path / "empty.pth", r"no tensors, but 'epoch' \(int\), 'args' \(mapping of 1\)")
    refuses(tmp_path, r"it holds 'empty\.pth'; give a file of it, e\.g\. '.*/empty\.pth'")
    (tmp_path / "fsdp").mkdir()
    (tmp_path / "fsdp/__0_0.distcp").write_text("")
    refuses(tmp_path / "fsdp", "format_utils dcp_to_torch '.*/fsdp' weights.pth")


def test_another_users_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    torch.save(BASE.state_dict(), path)
    monkeypatch.setattr(os, "access", lambda name, mode: Path(name) != path)  # root may read all
    refuses(path, r"a\.pth may not be read by this user \(permission denied\)")
    check_readable(tmp_path)


def test_a_colleagues_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = os.umask(0o022)
    try:
        run = make_run(tmp_path / "run")
    finally:
        os.umask(previous)
    step = run / "checkpoints/step-00000007"
    assert {path.stat().st_mode & 0o777 for path in step.iterdir()} == {0o644}
    forbidden = step / "base-0.safetensors"
    monkeypatch.setattr(os, "access", lambda name, mode: Path(name) != forbidden)
    refuses(run, r"step-00000007 cannot be read: .*Permission denied.*base-0\.safetensors")
    refuses(step, r"step-00000007 cannot be read: .*Permission denied.*base-0\.safetensors")
    forbidden = run / "checkpoints"
    refuses(run, r"the checkpoints of .*run cannot be read: .*Permission denied")


def test_names_that_wrappers_add_within_a_network(tmp_path: Path) -> None:
    wrapped = {
        n.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."): t
        for n, t in BASE.state_dict().items()
    }
    torch.save({"model": prefixed("_fsdp_wrapped_module.", BASE)}, tmp_path / "fsdp.pth")
    torch.save(wrapped, tmp_path / "blocks.pth")
    same(tmp_path / "fsdp.pth", BASE)
    same(tmp_path / "blocks.pth", BASE)
    both = dict(BASE.state_dict()) | prefixed("_orig_mod.", MOMENTUM)
    torch.save(both, tmp_path / "both.pth")
    refuses(tmp_path / "both.pth", "2 base encoders")


def test_two_models_of_a_folder_and_adapters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, module in (("model", BASE), ("model_1", MOMENTUM)):
        save_file(dict(module.state_dict()), tmp_path / f"{name}.safetensors")
    same(tmp_path, BASE)
    assert "model.safetensors, not model_1.safetensors beside it" in caplog.text
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refuses(tmp_path / "adapter", r"merge_and_unload\(\)")
