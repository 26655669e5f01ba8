"""Convolutions that make the tokens of a Vision Transformer (arXiv 2106.14881).

Kernels of 3 x 3 with stride 2, batch norm and ReLU after each, and a 1 x 1 convolution at the end;
their channels double up to the embedding. The batch norm makes the rows of a batch know each other.

Shape suffixes: B = images, C H W = image, N = patches, D = embedding.
"""

from torch import Tensor, nn


class ConvStem(nn.Module):
    """What timm calls a patch embedding; the places in `proj` are those of the published weights.

    Args:
        img_size: height and width of an image.
        patch_size: pixels of a patch's side, a power of 2: one convolution of stride 2 for each.
        in_chans: channels of an image.
        embed_dim: width D of a token, a multiple of half the patch's side.
    """

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        **_timm: object,
    ) -> None:
        super().__init__()
        convolutions = patch_size.bit_length() - 1
        if 2**convolutions != patch_size or convolutions < 1 or embed_dim % (patch_size // 2):
            raise ValueError(
                f"convolutions of stride 2 make patches of 2, 4, 8, 16 ... pixels and an embedding "
                f"that is a multiple of half of that; a patch of {patch_size} with an embedding of "
                f"{embed_dim} cannot be."
            )
        self.img_size, self.patch_size = img_size, (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        width = in_chans
        for index in range(convolutions):
            wider = embed_dim >> (convolutions - 1 - index)
            layers += [
                nn.Conv2d(width, wider, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.ReLU(inplace=True),
            ]
            width = wider
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, kernel_size=1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Tokens (B, N, D)."""
        assert x_BCHW.shape[2:] == self.img_size, f"images of {self.img_size} are needed"
        tokens_BDHW: Tensor = self.proj(x_BCHW)
        return tokens_BDHW.flatten(2).transpose(1, 2)
