"""Every setting of a run, with its default and its bounds.

Each setting has one owner. DeepSpeed's settings (ZeRO, offload, precision, clipping, the optimizer
and its parameters) are read from a plain DeepSpeed JSON. Ours (data, views, architecture, batch,
schedule, saving, evaluation) are the fields of `Config`; the string under a field is its help text.
The learning rate of the JSON's optimizer block is the paper's *base* rate: per 256 images.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mocov3_ds.config.parts import (
    TIMM,
    VIT_BACKBONES,
    AlarmConfig,
    DataConfig,
    KnnConfig,
    Logger,
    MocoConfig,
    ModelConfig,
    SaveConfig,
    SignalConfig,
    TroubleConfig,
    ViewConfig,
)
from mocov3_ds.model.own_backbones import OWN_BACKBONE, make_own_backbone
from mocov3_ds.model.shapes import (
    CONV_STEM_SHAPES,
    BackboneShape,
    EncoderShape,
    OwnShape,
    TimmShape,
    VitShape,
    parse_size,
)
from mocov3_ds.settings.bounds import (
    Bounds,
    Count,
    NonNegative,
    Positive,
    PositiveCount,
    Seed,
)
from mocov3_ds.settings.environment import DeviceChoice

RateRule = Literal["linear", "sqrt", "none"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a vision encoder with MoCo v3 on DeepSpeed.

    Without arguments: a two-minute run on drawn sample images, on any machine. The same command
    again continues where the run folder ends.
    """

    recipe: str = "tiny"
    """named starting point: tiny, cifar10, vit_s16, vit_b16, vit_l16, vit_h14 (and *_lamb),
    vit_conv_s16, vit_conv_b16, r50, r50_1000"""
    name: str = ""
    """name of the run folder in `runs`; empty = the recipe's name"""
    runs: Path = Path("runs")
    """folder of all runs"""
    init: str = ""
    """weights that both encoders start from instead of random ones: a run, one of its checkpoints,
    or a file or folder of another program (published MoCo v3, DINO, DeiT, timm, transformers); the
    first lines say what was taken and what was not"""
    init_which: Literal["base", "momentum"] = "base"
    """encoder that `init` takes where there are two"""
    extend: str = ""
    """folder of a finished run that this new one (FOLDER-extended) goes on from, with optimizer and
    momentum encoder; its settings are the defaults; give more --epochs, counted from its start"""
    extend_schedule: Literal["longer", "new"] = "longer"
    """longer = rate and momentum as if all epochs had been planned from the start; new = warm-up
    and decay begin again where the other run ended"""
    batch: PositiveCount = 4096
    """global batch: images per step over all ranks"""
    chunk: Count = 0
    """images per backbone pass (the result is exact at any value; a smaller one saves memory);
    0 = measure what fits; while --compress leaves patches out, more take the same memory"""
    keep_chunks: Count = 0
    """chunks that keep their activations, which takes memory and saves time (chosen when chunk is
    0)"""
    recompute_blocks: bool = False
    """recompute each block in the backward pass: less memory inside a chunk, or without chunks"""
    compile_blocks: bool = False
    """compile the blocks with torch.compile (not at ZeRO stage 3): same values up to rounding,
    about a minute at the start; slower in fp32 on an AMD processor"""
    overlap_keys: bool = False
    """compute the keys beside the queries, on a stream of the GPU of their own (not at ZeRO stage
    3): same values, a little more memory; of use to small networks that do not fill a GPU"""
    key_block: Count = 0
    """keys per block of the loss (exact at any value); 0 = all if 512 MiB hold the logits"""
    epochs: Positive = 300.0
    """passes over the training samples"""
    warmup_epochs: float = 40.0
    """epochs of linear warm-up, from 0 to all of them"""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: half a cosine down to 0, or the peak rate to the end"""
    rate_rule: RateRule = "linear"
    """peak rate of a batch from the base rate, which is stated for 256 images: linear = times
    batch / 256 (the paper's, with AdamW, LARS and LAMB); sqrt = times its square root (usual for
    LAMB, and for Adam where batches are huge); none = the base rate itself"""
    compress: str = "off"
    """train on a part of each image's patches at first, and on all of them at the end (arXiv
    2410.22364): off, 2x, 4x (that much less compute for the paper's ViTs at 224, less for others:
    mocov3 plan counts it), or a schedule of your own by the run's progress, e.g.
    "0:0.25 0.5:0.25 0.9:1" = a quarter for half of the run, growing to all at 90 %; a point may be
    q0.5,k1,p2 = half for queries, all for keys, patches of twice the side"""
    stop_after_steps: Count = 0
    """end early after this many steps, with a checkpoint; 0 = run to the end of the schedule"""
    hang_timeout: NonNegative = 0.0
    """seconds that reading a batch, computing a step, logging or saving may take before the run
    ends and names the rank that hangs; 0 = ten times the longest so far, at least 40 s for
    computing, 10 minutes for disks, a store's own retry time for data, and an hour the first two
    times (k-NN has no limit)"""
    decay: Literal["all", "matrices"] = "all"
    """all = weight decay on all trained tensors (the reference); matrices = none on biases, norms
    and the class token"""
    stopped_status: Annotated[int, Bounds(0, 255)] = 0
    """exit status after a signal ended the run early, with a checkpoint; choose one that is not 0
    for a manager that restarts only what failed (Kubernetes)"""
    log: tuple[Logger, ...] = ("tensorboard",)
    """where the numbers of metrics.jsonl go as well, one or several: --log wandb csv; --log with no
    name behind it = nowhere (monitoring/README.md)"""
    profile: Annotated[int, Bounds(0, 1000)] = 0
    """steps to profile, after two others; RUN/profile gets a table of where the time goes and a
    trace of each rank; 0 = none"""
    seed: Seed = 0
    """seed of the initialisation, the order of samples and the views"""
    device: DeviceChoice = "auto"
    """auto = the rank's GPU, or the CPU of a machine without one; cpu = leave GPUs alone, also
    where the run would take days"""
    tf32: bool = False
    """let matrix products in fp32 round their inputs to TF32 (10 bits) on GPUs that have it: many
    times faster, and the planner reckons with it; bf16 and fp16 are not touched"""
    deterministic: bool = False
    """refuse operations without a reproducible implementation (GPU; the CPU always reproduces)"""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moco: MocoConfig = field(default_factory=MocoConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    trouble: TroubleConfig = field(default_factory=TroubleConfig)
    signals: SignalConfig = field(default_factory=SignalConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    deepspeed_config: Path | None = None
    """DeepSpeed JSON; its optimizer block is honoured, batch sizes are derived from `batch`"""
    ds: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """one value of the DeepSpeed JSON, e.g. --ds zero_optimization.stage=2 (repeatable)"""

    @property
    def folder(self) -> Path:
        """Folder of this run."""
        return self.runs / (self.name or self.recipe)

    @property
    def backbone(self) -> BackboneShape:
        """Shape of the backbone."""
        model = self.model
        height, width = parse_size(self.views.image_size)
        if model.backbone.startswith(OWN_BACKBONE):
            name = model.backbone.removeprefix(OWN_BACKBONE)
            make = partial(make_own_backbone, name)
            return OwnShape(
                name=name, make=make, size=(height, width), channels=self.views.channels
            )
        if model.backbone not in VIT_BACKBONES:
            return TimmShape(
                name=model.backbone.removeprefix(TIMM),
                size=(height, width),
                channels=self.views.channels,
                arguments=model.timm,
            )
        from_flags = VitShape(
            patch_size=model.patch_size,
            dim=model.dim,
            depth=model.depth,
            heads=model.heads,
            stem="patch" if model.backbone == "vit" else "conv",
        )
        return dataclasses.replace(
            CONV_STEM_SHAPES.get(model.backbone, from_flags),
            image_size=height,
            image_width=0 if width == height else width,
            channels=self.views.channels,
        )

    @property
    def vit(self) -> VitShape:
        """Shape of the backbone, where it is one of our Vision Transformers.

        Raises:
            ValueError: it is another network.
        """
        return encoder_shape(self).vit


@dataclass(frozen=True)
class Settings:
    """A resolved command line: our settings and DeepSpeed's."""

    config: Config
    engine: dict[str, Any]
    """the DeepSpeed JSON with overrides applied, still with its optimizer block"""

    def as_json(self) -> dict[str, Any]:
        """All settings as plain JSON values, as `config.json` of a run holds them."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        del config["deepspeed_config"], config["ds"]
        return {"config": config, "deepspeed": self.engine}


def encoder_shape(config: Config) -> EncoderShape:
    """Architecture that the settings describe.

    Args:
        config: settings of the run.
    """
    return EncoderShape(
        backbone=config.backbone,
        hidden=config.model.hidden,
        out=config.model.out,
        projector_layers=config.model.projector_layers,
        predictor_norm=config.model.predictor_norm,
        positions=config.model.positions,
        train_patch_projection=config.model.patch_lr > 0,
        drop_path=config.model.drop_path,
        qk_norm=config.model.qk_norm,
        layer_scale=config.model.layer_scale,
        sigma_reparam=config.model.sigma_reparam,
        fp8=config.model.fp8,
    )
