"""Plain networks for examples and studies: perceptron, small CNN, ResNet18 in its CIFAR form, small ViT.

Each function is a factory: ``Task(lambda: resnet18(channels=1), ...)``. All but the perceptron take images
``[N, channels, height, width]``. None draws random numbers in training: a fleet of them is trained as one stack.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(features: int, classes: int, *, width: int = 256, depth: int = 2) -> nn.Module:
    """A perceptron with ``depth`` hidden layers of ``width`` units and ReLU; inputs of any shape are flattened.

    Args:
        features: of a sample, in all.
        classes: logits.
        width: units of a hidden layer.
        depth: hidden layers.
    """
    sizes = [features, *[width] * depth]
    hidden = [m for i in range(depth) for m in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def cnn(channels: int = 1, classes: int = 10, *, width: int = 32) -> nn.Module:
    """Two 3 x 3 convolutions with BatchNorm, ReLU and 2 x 2 max-pooling; a linear layer on the mean over positions.

    Args:
        channels: of the images, at least 4 x 4.
        classes: logits.
        width: channels of the first convolution; the second has twice as many.
    """
    layers: list[nn.Module] = []
    for inside, out in ((channels, width), (width, 2 * width)):
        layers += [nn.Conv2d(inside, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


class _Block(nn.Module):
    """Two 3 x 3 convolutions around which the input is carried; a 1 x 1 one where its shape changes."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inside == out
            else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _ResNet18(nn.Module):
    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_Block(sizes[i], sizes[i + 1], 1 if i == 0 else 2), _Block(sizes[i + 1], sizes[i + 1], 1))
                for i in range(4)
            )
        )
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.conv(x)))
        return self.head(self.stages(x).mean(dim=(2, 3)))


def resnet18(channels: int = 3, classes: int = 10, *, width: int = 64) -> nn.Module:
    """ResNet18 as used for CIFAR: a 3 x 3 stem of stride 1 and no max-pooling; 11.2 million weights at width 64.

    Args:
        channels: of the images, of any size.
        classes: logits.
        width: channels of the first stage; 64 is ResNet18, less a thinner one of the same form.

    Source:
        He, Zhang, Ren & Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.
    """
    return _ResNet18(channels, classes, width)


class _Encoder(nn.Module):
    """Attention and a perceptron of one hidden layer, each on normalised inputs and added to them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class _ViT(nn.Module):
    def __init__(self, size: int, patch: int, channels: int, classes: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2, dim) * 0.02)
        self.blocks = nn.Sequential(*(_Encoder(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches + self.position)).mean(dim=1))


def vit(
    size: int = 32,
    channels: int = 3,
    classes: int = 10,
    *,
    patch: int = 4,
    dim: int = 192,
    depth: int = 6,
    heads: int = 6,
) -> nn.Module:
    """A vision transformer without dropout, whose head sees the mean over patches.

    Args:
        size: height and width of the images, a multiple of ``patch``.
        channels: of the images.
        classes: logits.
        patch: height and width of a patch.
        dim: of a patch's representation, a multiple of ``heads``.
        depth: encoder blocks.
        heads: of attention.

    Raises:
        ValueError: ``size`` is no multiple of ``patch``, or ``dim`` of ``heads``.

    Source:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; mean pooling: Beyer, Zhai & Kolesnikov 2022.
    """
    if size % patch or dim % heads:
        raise ValueError(
            f"size must be a multiple of patch and dim of heads; got size {size}, patch {patch}, dim {dim}, "
            f"heads {heads}"
        )
    return _ViT(size, patch, channels, classes, dim, depth, heads)
