"""What does an exported folder say about itself? Its README.md, in Markdown."""

import json
from pathlib import Path

from mocov3_ds.encoders.choices import Format
from mocov3_ds.encoders.foreign_names import architecture_names, timm_sizes
from mocov3_ds.encoders.timm_networks import write_arguments
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.shapes import TimmShape, VitShape, write_size


def write_card(weights: Weights, to: Format, difference: float, results_table: str) -> str:
    """Text of the README.md: how to load the weights, what they are and how good they are.

    Args:
        weights: the encoder that was exported, with the image size it was exported for.
        to: program that the weights were written for.
        difference: largest difference of a feature between the encoder and the exported one.
        results_table: Markdown table of its accuracies; empty = it was not evaluated.
    """
    height, width = weights.backbone.size
    kind = (
        "Class-token features of a Vision Transformer"
        if isinstance(weights.backbone, VitShape)
        else f"Features of a network ({shape_name(weights.backbone)})"
    )
    return "\n\n".join(
        [
            _FRONT_MATTER[to] + f"# {weights.title}: MoCo v3 features",
            f"{kind} pretrained without labels "
            "([MoCo v3](https://arxiv.org/abs/2104.02057)), exported with mocov3-ds.",
            "## Load it",
            _explain_loading(weights, to),
            f"Input: RGB in [0, 1], normalised by mean {weights.settings.mean} and std "
            f"{weights.settings.std}, "
            f"{height} x {width} pixels. Evaluation resizes the shorter side "
            f"to {round(height * 256 / 224)} (bilinear) and crops the centre. Output: "
            f"{weights.width} features.",
            f"Loaded this way its features differ from the encoder's by {difference:.1e} at most "
            "(fp32, checked when it was exported).",
            "## What it is",
            _describe_encoder(weights),
            f"Not in this folder: {weights.left_out_of(to) or 'nothing that was there'}.",
            "## How good it is",
            results_table
            or "Not evaluated (`mocov3 knn`, `python -m mocov3_ds.evaluation.linear`).",
            "",
        ]
    )


_FRONT_MATTER = {
    to: "---\n"
    + (f"library_name: {library}\n" if library else "")
    + "pipeline_tag: image-feature-extraction\ntags:\n- mocov3-ds\n- moco-v3\n---\n\n"
    for to, library in (("timm", "timm"), ("deit", ""), ("hf", "transformers"), ("moco-v3", ""))
}
"""what a Hub reads of a card"""


_LOCAL_DIR = """import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:USER/NAME"
transform = create_transform(**resolve_model_data_config(model), is_training=False)"""


def _explain_loading(weights: Weights, to: Format) -> str:
    if isinstance(weights.backbone, TimmShape):
        name, sizes = weights.backbone.name, write_arguments(weights.backbone)
    else:
        name = architecture_names(weights.shape)[0]
        sizes = timm_sizes(weights.shape, [*weights.tensors])
    arguments = ", ".join(f"{key}={value!r}" for key, value in sizes.items())
    code = {
        "timm": f'import timm\n\nmodel = timm.create_model(\n    "{name}", '
        f'checkpoint_path="model.safetensors",\n    {arguments},\n).eval()\n'
        "features = model(images)",
        "deit": "import timm, torch\n\n"
        f'model = timm.create_model("{name}", {arguments})\n'
        'model.load_state_dict(torch.load("model.pth", weights_only=True)["model"])\n'
        "# or, in DeiT's and MAE's code: --finetune model.pth",
        "hf": "from transformers import ViTModel\n\n"
        'model = ViTModel.from_pretrained(".", add_pooling_layer=False).eval()\n'
        "features = model(pixel_values=images).last_hidden_state[:, 0]",
        "moco-v3": 'import torch\n\nstate = torch.load("model.pth.tar", weights_only=True)'
        '["state_dict"]\n# module.base_encoder.*, as in the published files; in the published code:'
        "\n# main_lincls.py --pretrained model.pth.tar",
    }[to]
    text = f"```python\n{code}\n```"
    if to == "timm":
        text += f"\n\nWith the preprocessing that belongs to it:\n\n```python\n{_LOCAL_DIR}\n```"
    return text


def _describe_encoder(weights: Weights) -> str:
    shape = weights.backbone
    rows = [("weights from", f"{weights.kind} `{weights.path.name}`, {weights.role} encoder")]
    if isinstance(shape, VitShape):
        rows += [
            ("width, blocks, heads", f"{shape.dim}, {shape.depth}, {shape.heads}"),
            ("patch, image", f"{shape.patch_size}, {write_size(shape.size)} pixels"),
            ("positions", "2-D, written out" if weights.positions == "sincos" else "none (zeros)"),
        ]
    else:
        rows.append(("network, image", f"{shape_name(shape)}, {write_size(shape.size)} pixels"))
    if weights.config is not None and weights.saved is not None:
        config = weights.config
        rows += [
            ("steps", f"{weights.saved.step}"),
            ("recipe", f"{config.recipe}: global batch {config.batch}, {config.epochs:g} epochs, "
             f"{config.warmup_epochs:g} of warm-up"),
            ("loss", f"temperature {config.moco.temperature}, momentum {config.moco.momentum} "
             f"({config.moco.momentum_schedule})"),
            *(
                [("patch projection", "trained" if config.model.patch_lr else "frozen at random")]
                if weights.is_plain_vit
                else []
            ),
            ("optimizer", _describe_optimizer(weights.path)),
        ]  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _describe_optimizer(run: Path) -> str:
    tree = json.loads((run / "config.json").read_text())
    block = tree.get("deepspeed", {}).get("optimizer", {})
    values = ", ".join(f"{key} {value}" for key, value in block.get("params", {}).items())
    return f"{block.get('type', 'unknown')}: {values}"
