"""Counts that follow from the architecture alone: tensors, kept activations, operations.

Shape suffixes: N = tokens of an image, D = embedding width.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mocov3_ds.model.base_encoder import EncoderShape

ATTENTION_BACKWARD = 2.5
"""flash attention's backward against its forward: it computes the scores again, five products"""

_NORM = ("weight", "bias")


@dataclass(frozen=True)
class TensorSize:
    """A parameter of the base encoder."""

    name: str
    numbers: int
    trained: bool = True


@lru_cache
def tensors(shape: EncoderShape) -> tuple[TensorSize, ...]:
    """Parameters of the base encoder, in the module's order."""
    dim, patch = shape.vit.dim, shape.vit.patch_size
    learns = shape.train_patch_projection
    found = [TensorSize("backbone.cls_token", dim)]
    if shape.positions == "sincos":
        found.append(TensorSize("backbone.pos_embed", tokens(shape) * dim, trained=False))
    found += [
        TensorSize("backbone.patch_embed.proj.weight", 3 * patch**2 * dim, learns),
        TensorSize("backbone.patch_embed.proj.bias", dim, learns),
    ]
    for block in range(shape.vit.depth):
        for name, numbers in _tensors_of_a_block(shape):
            found.append(TensorSize(f"backbone.blocks.{block}.{name}", numbers))
    found += [TensorSize("backbone.norm.weight", dim), TensorSize("backbone.norm.bias", dim)]
    found += _tensors_of_a_head("projector", [dim, shape.hidden, shape.hidden, shape.out])
    found += _tensors_of_a_head("predictor", [shape.out, shape.hidden, shape.out])
    return tuple(found)


def _tensors_of_a_block(shape: EncoderShape) -> list[tuple[str, int]]:
    dim, head = shape.vit.dim, shape.vit.dim // shape.vit.heads
    layers = {"attn.qkv": (dim, 3 * dim), "attn.proj": (dim, dim)}
    mlp = {"mlp.fc1": (dim, 4 * dim), "mlp.fc2": (4 * dim, dim)}
    found: list[tuple[str, int]] = []
    for norm, linears in (("norm1", layers), ("norm2", mlp)):
        found += [(f"{norm}.weight", dim), (f"{norm}.bias", dim)]
        for name, (fan_in, fan_out) in linears.items():
            found += [(f"{name}.weight", fan_in * fan_out), (f"{name}.bias", fan_out)]
            if name == "attn.qkv" and shape.qk_norm:
                found += [(f"attn.{which}_norm.{leaf}", head) for which in "qk" for leaf in _NORM]
    return found


def _tensors_of_a_head(name: str, sizes: list[int]) -> list[TensorSize]:
    found = []
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        found.append(TensorSize(f"{name}.{3 * layer}.weight", fan_in * fan_out))
        if layer < len(sizes) - 2:
            found.append(TensorSize(f"{name}.{3 * layer + 1}.weight", fan_out))
            found.append(TensorSize(f"{name}.{3 * layer + 1}.bias", fan_out))
    return found


@lru_cache
def trained(shape: EncoderShape) -> int:
    """Numbers that the optimizer updates."""
    return sum(tensor.numbers for tensor in tensors(shape) if tensor.trained)


@lru_cache
def weights(shape: EncoderShape) -> int:
    """Numbers of the base encoder, frozen ones included."""
    return sum(tensor.numbers for tensor in tensors(shape))


@lru_cache
def momentum_weights(shape: EncoderShape) -> int:
    """Numbers of the momentum encoder: the base encoder's without the predictor."""
    return sum(t.numbers for t in tensors(shape) if not t.name.startswith("predictor."))


def tokens(shape: EncoderShape) -> int:
    """Patches of an image and the class token."""
    return (shape.vit.image_size // shape.vit.patch_size) ** 2 + 1


def features_of_norms(shape: EncoderShape) -> list[int]:
    """Features of each batch norm that a view passes: those of the projector, of the predictor."""
    return [*[shape.hidden] * 2, shape.out, shape.hidden, shape.out]


# -- memory ----------------------------------------------------------------------------------------


def block_bytes(shape: EncoderShape, size: int) -> int:
    """What a block keeps for its backward, of one image.

    Sixteen numbers a token and feature: input of each of two norms (2), their outputs as input of
    qkv and fc1 (2), queries, keys and values (3), attention's output (1), fc1's output (4) and
    GELU's (4); two more where queries and keys are normalised. Attention that is computed in tiles
    keeps no scores but a log-sum a row and head.

    Args:
        shape: architecture.
        size: bytes of a number.
    """
    numbers = (16 + 2 * shape.qk_norm) * shape.vit.dim
    statistics = 2 * (2 + 2 * shape.vit.heads * shape.qk_norm) * size + 4 * shape.vit.heads
    return tokens(shape) * (numbers * size + statistics)


def last_block_bytes(shape: EncoderShape, size: int) -> int:
    """The same for the last block, which computes the class token alone behind its attention.

    All tokens: input and output of its first norm (2), queries, keys and values (3).
    """
    all_tokens = tokens(shape) * (5 * shape.vit.dim + 2 + 2 * shape.vit.dim * shape.qk_norm) * size
    token = (11 * shape.vit.dim + 2) * size + 4 * shape.vit.heads
    return all_tokens + token


def backbone_bytes(shape: EncoderShape, size: int, *, recompute_blocks: bool = False) -> int:
    """What the backbone keeps for its backward, of one image of one view.

    A block that is recomputed keeps its input alone; the last norm sees the class token alone.
    """
    depth, dim = shape.vit.depth, shape.vit.dim
    patches = 3 * shape.vit.image_size**2 * size * shape.train_patch_projection
    end = (dim + 2) * size + patches
    if recompute_blocks:
        return depth * tokens(shape) * dim * size + end
    return (depth - 1) * block_bytes(shape, size) + last_block_bytes(shape, size) + end


def working_bytes(shape: EncoderShape, size: int) -> int:
    """What a block at work needs in a forward pass that keeps nothing, of one image.

    At GELU: its input (4) and output (4), the block's input (1) and the norm's output (1).
    """
    return 10 * tokens(shape) * shape.vit.dim * size


def backward_bytes(shape: EncoderShape, size: int, *, recompute_blocks: bool = False) -> int:
    """What the backward of a block needs beside what the forward kept, of one image.

    The gradient of the block's output (1) and of GELU's output (4); of what was kept, GELU's output
    is given up before the next gradient. A recomputed block makes what it keeps anew first.
    """
    again = block_bytes(shape, size) if recompute_blocks else 0
    return again + 5 * tokens(shape) * shape.vit.dim * size


def head_bytes(shape: EncoderShape, size: int) -> int:
    """What projector and predictor keep for their backward, of one image of one view.

    A linear layer keeps its input; a batch norm its fp32 output; in low precision, ReLU's output in
    that precision, in fp32 the scaled output that ReLU overwrites.
    """
    hidden = 3 * shape.hidden * (4 + size)
    last = 2 * shape.out * 4
    between = shape.out * size if size < 4 else 0  # fp32: the norm's own output is the next input
    return shape.vit.dim * size + hidden + last + between


def head_working_bytes(shape: EncoderShape, size: int) -> int:
    """What a head needs beside, of one image: a hidden layer's fp32 copies while it is at work."""
    return shape.hidden * (3 * 4 + size)


def image_bytes(shape: EncoderShape, size: int) -> int:
    """A view on the device and the bytes it was made of."""
    return 3 * shape.vit.image_size**2 * (size + 1)


# -- operations ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved between matrix products, of a rank's step."""

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


def forward_of_an_image(shape: EncoderShape) -> Work:
    """Operations of one backbone pass over one view of one image (a multiply-add is two)."""
    block, last = block_of_an_image(shape), _last_block(shape)
    return Work(_patch_projection(shape)) + block * (shape.vit.depth - 1) + last


def block_of_an_image(shape: EncoderShape) -> Work:
    """Operations of one block, forward."""
    rows, dim = tokens(shape), shape.vit.dim
    return Work(linear=2 * rows * 12 * dim**2, attention=4 * rows**2 * dim)


def _last_block(shape: EncoderShape) -> Work:
    """Queries, keys and values of all tokens; then the class token alone."""
    rows, dim = tokens(shape), shape.vit.dim
    return Work(linear=2 * (3 * rows + 9) * dim**2, attention=4 * rows * dim)


def _patch_projection(shape: EncoderShape) -> float:
    return 2.0 * (tokens(shape) - 1) * 3 * shape.vit.patch_size**2 * shape.vit.dim


def backward_of_an_image(shape: EncoderShape) -> Work:
    """The same for the gradients of weights and inputs; pixels need none, frozen weights neither.

    Attention's backward is counted as two of its forward; see `ATTENTION_BACKWARD`.
    """
    forward, patch = forward_of_an_image(shape), _patch_projection(shape)
    linear = 2 * (forward.linear - patch) + patch * shape.train_patch_projection
    return Work(linear, 2 * forward.attention)


def heads_of_an_image(shape: EncoderShape) -> Work:
    """Both heads of the queries, forward and backward, and the keys' projector; one view."""
    dim, hidden, out = shape.vit.dim, shape.hidden, shape.out
    projector = 2.0 * (dim * hidden + hidden**2 + hidden * out)
    predictor = 2.0 * 2 * out * hidden
    return Work(3 * (projector + predictor) + projector)


def model_operations(shape: EncoderShape) -> float:
    """Operations that an image needs in a step, whoever computes them: what MFU counts.

    Two views, each a query forward, its backward and a key forward. The last block's other tokens,
    which the paper's figures count (but nobody reads), and the logits (0.01 %) are left out.
    """
    forward, backward = forward_of_an_image(shape), backward_of_an_image(shape)
    heads = heads_of_an_image(shape)
    return 2 * (forward * 2 + backward + heads).operations


def step_of_an_image(shape: EncoderShape, size: int, recomputed: float) -> Work:
    """What a rank executes for one image: `model_operations`, and what is computed again.

    Args:
        shape: architecture.
        size: bytes of a number of the network.
        recomputed: share of the query passes that run a second time.
    """
    forward, backward = forward_of_an_image(shape), backward_of_an_image(shape)
    row = tokens(shape) * shape.vit.dim * size * shape.vit.depth
    # read and written: two norms (4), GELU (8), two residuals (6)
    forward = Work(forward.linear, forward.attention, 18 * row)
    # two norms (8), GELU (12), gradients that meet (6), sums for the biases (9)
    again = ATTENTION_BACKWARD * forward.attention
    backward = Work(backward.linear, again, 35 * row)
    return (forward * (2 + recomputed) + backward + heads_of_an_image(shape)) * 2
