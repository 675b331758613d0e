"""Pixtral's vision transformer (arXiv:2410.07073) and its projector, in PyTorch.

Its blocks are those of the decoder. What differs: the positions are those of a grid, and a
patch sees its whole image, and no other. As in the decoder, arithmetic follows the dtype of the
weights, and norms, rotations, scores and softmax are at least float32.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from lechat_jax.config import VisionConfig
from lechat_jax.config.vision import CHANNELS
from lechat_torch.attention import dense_attention
from lechat_torch.block import Block, Mix, Place, RMSNorm
from lechat_torch.rotary import rotations

Grid = tuple[int, int]  # rows and columns of patches, or of what they are merged into


class VisionTower(nn.Module):
    """Pixtral's vision transformer (ViT) over the patches of images of any sizes.

    There is no norm behind the last block.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        side = config.patch_size
        self.patch = nn.Conv2d(CHANNELS, config.dim, side, stride=side, bias=False)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.n_layers)])

    def forward(
        self, images: Sequence[Float[Tensor, "3 _height _width"]]
    ) -> Float[Tensor, "patches d"]:
        """Features of all patches, image after image, each row by row; laid end to end.

        Raises:
            ValueError: a side of an image is not that of whole patches.
        """
        c = self.config
        for _, height, width in (image.shape for image in images):
            if height % c.patch_size or width % c.patch_size:  # the convolution would cut them off
                raise ValueError(f"{height} x {width} pixels are no patches of {c.patch_size}")
        maps = [self.patch(image.to(self.patch.weight.dtype)) for image in images]
        grids = [(each.shape[1], each.shape[2]) for each in maps]
        lengths = [rows * columns for rows, columns in grids]
        x = self.norm(torch.cat([each.flatten(1).T for each in maps])[None])
        place = Place(grid_rotations(grids, c.head_dim, c.rope_theta, x), stretch=None)
        mix = Mix(functools.partial(attend_within_images, lengths=lengths))
        for block in self.blocks:
            x = block(x, place, mix)
        return x[0]


class Projector(nn.Module):
    """Multimodal projector: patches merged into tokens, and an MLP into the decoder's width D.

    Pixtral 12B merges nothing, normalises nothing and has biases; all later models do the
    opposite of each.
    """

    def __init__(self, config: VisionConfig, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.side = config.spatial_merge_size
        d, lanes = config.dim, config.dim * config.n_merged
        self.norm = RMSNorm(d, norm_eps) if config.projector_norm else nn.Identity()
        self.merge = nn.Linear(lanes, d, bias=False) if self.side > 1 else nn.Identity()
        self.linear_1 = nn.Linear(d, dim, bias=config.projector_bias)
        self.linear_2 = nn.Linear(dim, dim, bias=config.projector_bias)

    def forward(
        self, patches: Float[Tensor, "patches d"], grids: Sequence[Grid]
    ) -> Float[Tensor, "tokens D"]:
        """An embedding for each square of patches, image after image, each row by row."""
        x = self.merge(merge_patches(self.norm(patches[None])[0], grids, self.side))
        return self.linear_2(F.gelu(self.linear_1(x)))  # by the error function, not by tanh


def grid_rotations(
    grids: Sequence[Grid], head_dim: int, theta: float, like: Tensor
) -> Complex[Tensor, "1 patches 1 pairs"]:
    """2D rotary positions (RoPE-2D): half of the pairs turn by the row, half by the column.

    The frequencies are those of text, dealt out in turn: the first, third, ... to the rows, the
    others to the columns. Each image begins at row 0 and column 0. Device and dtype, but at
    least float32, are those of `like`.

    >>> turned = grid_rotations([(1, 2), (2, 1)], 8, 16.0, torch.ones(1, dtype=torch.float64))
    >>> turned.angle().squeeze().round(decimals=3).tolist()  # of the frequencies 1 1/2 1/4 1/8
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.125], [0.0, 0.0, 0.0, 0.0], [1.0, 0.25, 0.0, 0.0]]
    """
    places = torch.cat([torch.cartesian_prod(*map(torch.arange, grid)) for grid in grids])
    by_row, by_column = (
        rotations(positions[None].to(like.device), head_dim, theta, like.dtype)
        for positions in places.T
    )
    return torch.cat([by_row[..., 0::2], by_column[..., 1::2]], dim=-1)


def attend_within_images(
    q: Float[Tensor, "1 T N H"],
    k: Float[Tensor, "1 T N H"],
    v: Float[Tensor, "1 T N H"],
    lengths: Sequence[int],
) -> Float[Tensor, "1 T N H"]:
    """Block-diagonal attention: each patch gathers from all patches of its image, and no other.

    Image by image, so that no mask can be wrong, nor scores of two images take up memory.
    """
    images = (x.split(list(lengths), dim=1) for x in (q, k, v))
    mixed = []
    for queries, keys, values in zip(*images, strict=True):
        T = queries.shape[1]
        mixed.append(dense_attention(queries, keys, values, bias=queries.new_zeros(T, T)))
    return torch.cat(mixed, dim=1)


def merge_patches(
    patches: Float[Tensor, "patches d"], grids: Sequence[Grid], side: int
) -> Float[Tensor, "tokens lanes"]:
    """Patch merging (space to depth): the lanes of `side` by `side` patches in one, channel-major.

    So the lanes of one channel lie together, those of a square row by row, as `unfold` has them.

    >>> patches = torch.tensor([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0], [3.0, 13.0]])
    >>> merge_patches(patches, [(2, 2)], 2).tolist()
    [[0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]]
    """
    images = patches.split([rows * columns for rows, columns in grids])
    maps = (image.T.unflatten(1, grid) for image, grid in zip(images, grids, strict=True))
    return torch.cat([F.pixel_unshuffle(each, side).flatten(1).T for each in maps])


def splice(
    x: Float[Tensor, "1 T D"],
    tokens: Int[Tensor, "1 T"],
    features: Float[Tensor, "image_tokens D"],
    image_token_id: int,
) -> Float[Tensor, "1 T D"]:
    """Embeddings of a text with those of its images in the places of the image tokens, in order.

    >>> tokens, features = torch.tensor([[10, 3, 10]]), torch.tensor([[5.0], [7.0]])
    >>> splice(torch.ones(1, 3, 1), tokens, features, image_token_id=10).tolist()
    [[[5.0], [1.0], [7.0]]]

    Raises:
        ValueError: there are more image tokens than features, or fewer.
    """
    is_image = tokens == image_token_id
    if is_image.sum() != len(features):
        raise ValueError(f"{is_image.sum()} image tokens, but {len(features)} features of images")
    return x.masked_scatter(is_image[:, :, None], features.to(x.dtype))
