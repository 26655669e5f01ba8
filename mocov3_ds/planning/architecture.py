"""What follows from the architecture alone: tensors, bytes that a pass keeps, operations.

Every function of bytes takes `number_bytes`, the bytes of one number of the network (4 or 2). The
Vision Transformer of plain patches is computed by formulas; any other backbone is counted in a pass
that computes nothing (`measured_backbone`), and is planned more coarsely where that is said.

Shape suffixes: N = tokens of an image, D = embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod

from mocov3_ds.config.compression import Patches, StepLength
from mocov3_ds.model.backbones import shape_name
from mocov3_ds.model.base_encoder import EncoderShape
from mocov3_ds.model.shapes import VitShape
from mocov3_ds.planning.measured_backbone import MeasuredBackbone, measure_backbone
from mocov3_ds.planning.measured_backbone import TensorSize as TensorSize

ATTENTION_BACKWARD = 2.5
"""flash attention's backward against its forward: it computes the scores again, five products"""

_NORM_LEAVES = ("weight", "bias")


def measure_other(
    shape: EncoderShape, patches: int = 0, patch_scale: float = 1.0
) -> MeasuredBackbone | None:
    """Counts of a backbone that the formulas do not cover; None = they do.

    Args:
        shape: architecture of the encoder.
        patches: patches of an image that a pass keeps; 0 = all.
        patch_scale: side of a patch over that of a whole sequence.
    """
    backbone = shape.backbone
    if isinstance(backbone, VitShape) and backbone.stem == "patch":
        return None
    return measure_backbone(shape, patches, patch_scale)


def patches_of(shape: EncoderShape) -> Patches:
    """The patches that a backbone makes of an image."""
    counts, backbone = measure_other(shape), shape.backbone
    return Patches(
        network=shape_name(backbone),
        image_size=backbone.size,
        count=prod(shape.vit.grid) if counts is None else counts.patches,
        side=shape.vit.patch_size if counts is None else counts.patch_size,
    )


def rows_know_each_other(shape: EncoderShape) -> bool:
    """Whether a batch norm in the backbone makes a rank's images go through it in one pass."""
    counts = measure_other(shape)
    return counts is not None and bool(counts.norm_channels)


def feature_width(shape: EncoderShape) -> int:
    """Numbers of an image's features."""
    counts = measure_other(shape)
    return counts.width if counts is not None else shape.vit.dim


@lru_cache
def list_tensors(shape: EncoderShape) -> tuple[TensorSize, ...]:
    """Parameters of the base encoder, in the order of the module."""
    counts = measure_other(shape)
    tensors = list(counts.tensors) if counts is not None else _list_vit_tensors(shape)
    hidden = [shape.hidden] * (shape.projector_layers - 1)
    tensors += _list_head_tensors("projector", [feature_width(shape), *hidden, shape.out])
    tensors += _list_head_tensors("predictor", [shape.out, shape.hidden, shape.out])
    return tuple(tensors)


def _list_vit_tensors(shape: EncoderShape) -> list[TensorSize]:
    dim, patch = shape.vit.dim, shape.vit.patch_size
    learns = shape.train_patch_projection
    tensors = [TensorSize("backbone.cls_token", dim)]
    if shape.positions == "sincos":
        tensors.append(TensorSize("backbone.pos_embed", count_tokens(shape) * dim, trained=False))
    tensors += [
        TensorSize("backbone.patch_embed.proj.weight", shape.vit.channels * patch**2 * dim, learns),
        TensorSize("backbone.patch_embed.proj.bias", dim, learns),
    ]
    for block in range(shape.vit.depth):
        for name, numbers in _list_block_tensors(shape):
            tensors.append(TensorSize(f"backbone.blocks.{block}.{name}", numbers))
    tensors += [TensorSize("backbone.norm.weight", dim), TensorSize("backbone.norm.bias", dim)]
    return tensors


def _list_block_tensors(shape: EncoderShape) -> list[tuple[str, int]]:
    dim, head = shape.vit.dim, shape.vit.dim // shape.vit.heads
    attention = {"attn.qkv": (dim, 3 * dim), "attn.proj": (dim, dim)}
    mlp = {"mlp.fc1": (dim, 4 * dim), "mlp.fc2": (4 * dim, dim)}
    tensors: list[tuple[str, int]] = []
    for norm, linears in (("norm1", attention), ("norm2", mlp)):
        tensors += [(f"{norm}.weight", dim), (f"{norm}.bias", dim)]
        for name, (fan_in, fan_out) in linears.items():
            tensors += [(f"{name}.weight", fan_in * fan_out), (f"{name}.bias", fan_out)]
            tensors += [(f"{name}.gain", 1)] * shape.sigma_reparam
            if name == "attn.qkv" and shape.qk_norm:
                tensors += [
                    (f"attn.{qk}_norm.{leaf}", head) for qk in "qk" for leaf in _NORM_LEAVES
                ]
        if shape.layer_scale:
            tensors.append((f"{norm.replace('norm', 'ls')}.gamma", dim))
    return tensors


def _list_head_tensors(name: str, widths: Sequence[int]) -> list[TensorSize]:
    tensors = []
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        tensors.append(TensorSize(f"{name}.{3 * layer}.weight", fan_in * fan_out))
        if layer < len(widths) - 2:
            tensors.append(TensorSize(f"{name}.{3 * layer + 1}.weight", fan_out))
            tensors.append(TensorSize(f"{name}.{3 * layer + 1}.bias", fan_out))
    return tensors


@lru_cache
def count_trained(shape: EncoderShape) -> int:
    """Numbers that the optimizer updates."""
    return sum(tensor.numbers for tensor in list_tensors(shape) if tensor.trained)


@lru_cache
def count_weights(shape: EncoderShape) -> int:
    """Numbers of the base encoder with its heads, frozen ones included."""
    return sum(tensor.numbers for tensor in list_tensors(shape))


@lru_cache
def count_momentum_weights(shape: EncoderShape) -> int:
    """Numbers of the momentum encoder: the base encoder's without the predictor."""
    return sum(t.numbers for t in list_tensors(shape) if not t.name.startswith("predictor."))


def count_tokens(shape: EncoderShape) -> int:
    """Patches of an image and the class token."""
    return prod(shape.vit.grid) + 1


def batch_norm_features(shape: EncoderShape, *, keys: bool = False) -> list[int]:
    """Features of each batch norm that a view passes: backbone, projector, predictor.

    Args:
        shape: architecture of the encoder.
        keys: whether the view passes the momentum encoder, which has no predictor.
    """
    counts = measure_other(shape)
    body = list(counts.norm_channels) if counts is not None else []
    projector = [shape.hidden] * (shape.projector_layers - 1) + [shape.out]
    predictor = [shape.hidden] + [shape.out] * shape.predictor_norm
    return body + projector + predictor * (not keys)


# -- memory ----------------------------------------------------------------------------------------


def block_bytes(shape: EncoderShape, number_bytes: int) -> int:
    """What a block keeps for its backward, of one image.

    Sixteen numbers a token and feature: input of each of two norms (2), their outputs as input of
    qkv and fc1 (2), queries, keys and values (3), attention's output (1), fc1's output (4) and
    GELU's (4); two more where queries and keys are normalised, and two with LayerScale (both
    branches). Attention that is computed in tiles keeps no scores, only one log-sum for each row
    and head.
    """
    numbers = (16 + 2 * shape.qk_norm + 2 * bool(shape.layer_scale)) * shape.vit.dim
    heads = shape.vit.heads
    statistics = 2 * (2 + 2 * heads * shape.qk_norm) * number_bytes + 4 * heads
    return count_tokens(shape) * (numbers * number_bytes + statistics)


def last_block_bytes(shape: EncoderShape, number_bytes: int) -> int:
    """The same for the last block, which computes the class token alone behind its attention.

    All tokens: input and output of its first norm (2), queries, keys and values (3).
    """
    numbers = 5 * shape.vit.dim + 2 + 2 * shape.vit.dim * shape.qk_norm
    features = (11 + 2 * bool(shape.layer_scale)) * shape.vit.dim
    class_token = (features + 2) * number_bytes + 4 * shape.vit.heads
    return count_tokens(shape) * numbers * number_bytes + class_token


def backbone_bytes(
    shape: EncoderShape, number_bytes: int, *, recompute_blocks: bool = False
) -> int:
    """What the backbone keeps for its backward, of one image of one view.

    A block that is recomputed keeps its input alone; the last norm sees the class token alone. Of
    another backbone, recomputation is not planned: it keeps all that a pass was seen to keep.
    """
    if (counts := measure_other(shape)) is not None:
        return round(counts.kept_numbers * number_bytes)
    depth, dim = shape.vit.depth, shape.vit.dim
    patches = count_pixels(shape) * number_bytes * shape.train_patch_projection
    ends = (dim + 2) * number_bytes + patches
    if recompute_blocks:
        return depth * count_tokens(shape) * dim * number_bytes + ends
    blocks = (depth - 1) * block_bytes(shape, number_bytes)
    return blocks + last_block_bytes(shape, number_bytes) + ends


def working_bytes(shape: EncoderShape, number_bytes: int) -> int:
    """What a block at work needs in a forward pass that keeps nothing, of one image.

    At GELU: its input (4) and output (4), the block's input (1) and the norm's output (1). Of
    another backbone, three of its largest tensors.
    """
    if (counts := measure_other(shape)) is not None:
        return round(3 * counts.largest * number_bytes)
    return 10 * count_tokens(shape) * shape.vit.dim * number_bytes


def backward_bytes(
    shape: EncoderShape, number_bytes: int, *, recompute_blocks: bool = False
) -> int:
    """What the backward of a block needs beside what the forward kept, of one image.

    The gradient of the block's output (1) and of GELU's output (4); of what was kept, GELU's output
    is freed before the next gradient. A recomputed block first computes what it keeps. Of another
    backbone, three of its largest tensors.
    """
    if (counts := measure_other(shape)) is not None:
        return round(3 * counts.largest * number_bytes)
    recomputed = block_bytes(shape, number_bytes) if recompute_blocks else 0
    return recomputed + 5 * count_tokens(shape) * shape.vit.dim * number_bytes


def head_bytes(shape: EncoderShape, number_bytes: int) -> int:
    """What projector and predictor keep for their backward, of one image of one view.

    A linear layer keeps its input; a batch norm its fp32 output; in low precision, ReLU's output in
    that precision, in fp32 the scaled output that ReLU overwrites.
    """
    hidden = shape.projector_layers * shape.hidden * (4 + number_bytes)
    last_norms = (1 + shape.predictor_norm) * shape.out * 4
    # in fp32 the projector's output, a norm's own output, is the predictor's input
    predictor_input = shape.out * number_bytes if number_bytes < 4 else 0
    return feature_width(shape) * number_bytes + hidden + last_norms + predictor_input


def head_working_bytes(shape: EncoderShape, number_bytes: int) -> int:
    """What a head needs while a hidden layer is at work, of one image: that layer's fp32 copies."""
    return shape.hidden * (3 * 4 + number_bytes)


def view_bytes(shape: EncoderShape, number_bytes: int) -> int:
    """A view of one image on the device, the crop it was made of, and that of the next batch."""
    return count_pixels(shape) * (number_bytes + 2)


def count_pixels(shape: EncoderShape) -> int:
    """Numbers of an image: channels, rows and columns."""
    return shape.backbone.channels * prod(shape.backbone.size)


# -- operations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes moved between matrix products."""

    linear: float
    """operations of linear layers"""
    attention: float = 0.0
    """operations of attention"""
    moved: float = 0.0
    """bytes that norms, activations, residuals and reductions read and write"""

    @property
    def operations(self) -> float:
        """All floating-point operations of matrix products."""
        return self.linear + self.attention

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.linear + other.linear, self.attention + other.attention, self.moved + other.moved
        )

    def __mul__(self, times: float) -> "Work":
        return Work(self.linear * times, self.attention * times, self.moved * times)


def forward_work(shape: EncoderShape, patches: int = 0, patch_scale: float = 1.0) -> Work:
    """One backbone pass over one view of one image (a multiply-add is two operations).

    Args:
        shape: architecture of the encoder.
        patches: patches of the image that the pass keeps; 0 = all.
        patch_scale: side of a patch over that of a whole sequence.
    """
    if (counts := measure_other(shape, patches, patch_scale)) is not None:
        return Work(counts.forward_operations)
    blocks = block_work(shape, patches) * (shape.vit.depth - 1)
    return Work(_patch_projection_operations(shape)) + blocks + _last_block_work(shape, patches)


def block_work(shape: EncoderShape, patches: int = 0) -> Work:
    """One block, forward, of one image, of which `patches` are kept (0 = all)."""
    tokens, dim = patches + 1 if patches else count_tokens(shape), shape.vit.dim
    return Work(linear=2 * tokens * 12 * dim**2, attention=4 * tokens**2 * dim)


def _last_block_work(shape: EncoderShape, patches: int) -> Work:
    """Queries, keys and values of all tokens; then the class token alone."""
    tokens, dim = patches + 1 if patches else count_tokens(shape), shape.vit.dim
    return Work(linear=2 * (3 * tokens + 9) * dim**2, attention=4 * tokens * dim)


def _patch_projection_operations(shape: EncoderShape) -> float:
    return 2.0 * count_pixels(shape) * shape.vit.dim


def backward_work(shape: EncoderShape, patches: int = 0, patch_scale: float = 1.0) -> Work:
    """The backward of `forward_work`: gradients of weights and inputs.

    Pixels need no gradient, frozen weights neither. Attention's backward is counted as two of its
    forward; see `ATTENTION_BACKWARD`.

    Args:
        shape: architecture of the encoder.
        patches: patches of the image that the pass keeps; 0 = all.
        patch_scale: side of a patch over that of a whole sequence.
    """
    if (counts := measure_other(shape, patches, patch_scale)) is not None:
        return Work(counts.backward_operations)
    forward, patch = forward_work(shape, patches), _patch_projection_operations(shape)
    linear = 2 * (forward.linear - patch) + patch * shape.train_patch_projection
    return Work(linear, 2 * forward.attention)


def heads_work(shape: EncoderShape) -> Work:
    """Both heads of the queries, forward and backward, and the keys' projector; one view."""
    dim, hidden, out = feature_width(shape), shape.hidden, shape.out
    projector = 2.0 * (dim * hidden + (shape.projector_layers - 2) * hidden**2 + hidden * out)
    predictor = 2.0 * 2 * out * hidden
    return Work(3 * (projector + predictor) + projector)


def model_operations(shape: EncoderShape, length: StepLength | None = None) -> float:
    """Operations that an image needs in a step, computed once each: what MFU counts.

    Two views, each a query forward, its backward and a key forward. The last block's other tokens,
    which the paper's figures count (but nobody reads), and the logits (0.01 %) are left out.

    Args:
        shape: architecture of the base encoder.
        length: patches that take part in the step; None = all.
    """
    queries, keys, scale = _patches_in(length)
    forward = forward_work(shape, queries, scale) + forward_work(shape, keys, scale)
    return 2 * (forward + backward_work(shape, queries, scale) + heads_work(shape)).operations


def _patches_in(length: StepLength | None) -> tuple[int, int, float]:
    """Patches of queries and of keys (0 = all), and patch scale."""
    if length is None:
        return 0, 0, 1.0
    return length.query_patches, length.key_patches, length.patch_scale


def step_work(
    shape: EncoderShape, number_bytes: int, recomputed: float, length: StepLength | None = None
) -> Work:
    """What a rank executes for one image: `model_operations`, and what is computed again.

    Args:
        shape: architecture of the base encoder.
        number_bytes: bytes of one number of the network.
        recomputed: share of the query passes that run a second time, from 0 to 1.
        length: patches that take part in the step; None = all.
    """
    queries, keys, scale = _patches_in(length)
    key_pass = _executed_forward(shape, number_bytes, keys, scale)
    query_pass = _executed_forward(shape, number_bytes, queries, scale)
    backward = _executed_backward(shape, number_bytes, queries, scale)
    return (key_pass + query_pass * (1 + recomputed) + backward + heads_work(shape)) * 2


def _executed_forward(shape: EncoderShape, number_bytes: int, patches: int, scale: float) -> Work:
    forward = forward_work(shape, patches, scale)
    if (counts := measure_other(shape, patches, scale)) is not None:
        # what is kept is written and read once
        return Work(forward.linear, moved=2 * counts.kept_numbers * number_bytes)
    # read and written: two norms (4), GELU (8), two residuals (6)
    return Work(forward.linear, forward.attention, 18 * _row_bytes(shape, number_bytes, patches))


def _executed_backward(shape: EncoderShape, number_bytes: int, patches: int, scale: float) -> Work:
    backward = backward_work(shape, patches, scale)
    if (counts := measure_other(shape, patches, scale)) is not None:
        # what is kept, and its gradient
        return Work(backward.linear, moved=4 * counts.kept_numbers * number_bytes)
    # two norms (8), GELU (12), gradients that meet (6), sums for the biases (9)
    attention = ATTENTION_BACKWARD * forward_work(shape, patches).attention
    return Work(backward.linear, attention, 35 * _row_bytes(shape, number_bytes, patches))


def _row_bytes(shape: EncoderShape, number_bytes: int, patches: int) -> int:
    """Bytes of a number for each token, feature and block."""
    tokens = patches + 1 if patches else count_tokens(shape)
    return tokens * shape.vit.dim * number_bytes * shape.vit.depth
