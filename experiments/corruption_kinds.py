"""What each corruption does to a batch of images; which there are, and how strong, is in `experiments.corruptions`.

Every function takes images (N, C, H, W), float32 in [0, 1], the parameters of one severity and a generator, and returns
new images of the same shape, whose pixels may lie outside [0, 1]. All images of a batch are corrupted at once, each
with draws of its own.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(2019), appendix A. Intermediate images are not rounded to 8 bits, as theirs are.
"""

import functools
import io
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (Rec. 601)."""


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).mul_(high - low).add_(low)


def _normal(shape: "tuple[int, ...] | torch.Size", generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


# ---- noise -----------------------------------------------------------------------------------------------------------


def gaussian_noise(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Add independent normals: a dark photograph."""
    return x + std * _normal(x.shape, generator)


def shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Count photons, so many of them on average where the image is white."""
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Set this fraction of the values to 0 or 1, either with probability one half."""
    hit, value = torch.rand(2, *x.shape, generator=generator)
    return torch.where(hit < amount, (value < 0.5).to(x.dtype), x)


def speckle_noise(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Multiply by independent normals around 1."""
    return x + std * x * _normal(x.shape, generator)


# ---- blur ------------------------------------------------------------------------------------------------------------


def gaussian_blur(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Smooth with a Gaussian [pixels], edges continued."""
    return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, std, std), mode="nearest"))


def defocus_blur(x: Tensor, sizes: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Average over a disk (radius [pixels], and standard deviation of the Gaussian that smooths its rim)."""
    kernel = torch.from_numpy(_disk(*sizes)).to(x.dtype)
    half = len(kernel) // 2
    planes = pad(x.flatten(0, 1).unsqueeze(1), (half, half, half, half), mode="reflect")
    return conv2d(planes, kernel[None, None]).view(x.shape)


def _disk(radius: float, std: float) -> np.ndarray:
    """Weights of the pixels in a disk, its rim smoothed by a 3x3 Gaussian; they sum to 1."""
    half = math.floor(radius) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    disk = (x**2 + y**2 <= radius**2).astype(float)
    smooth = ndimage.gaussian_filter(disk, std, mode="constant", radius=1)
    return smooth / smooth.sum()


def motion_blur(x: Tensor, sizes: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Smear along a line within 45° of the horizontal (radius and standard deviation [pixels])."""
    return _smear(x, *sizes, _uniform((len(x),), -45, 45, generator))


def _smear(x: Tensor, radius: float, std: float, angles: Tensor) -> Tensor:
    """Average over the pixels on one side along a line, with the weights of half a Gaussian, as ImageMagick does.

    Args:
        x: Images (N, C, H, W).
        radius: The line has 2 ceil(radius) + 1 pixels.
        std: Of the Gaussian [pixels].
        angles: Of each image's line with the horizontal, (N,) [degrees].
    """
    count = 2 * math.ceil(radius) + 1
    weights = torch.exp(-(torch.arange(count, dtype=torch.float64) ** 2) / (2 * std**2))
    weights /= weights.sum()
    step_x, step_y = angles.double().deg2rad().cos(), angles.double().deg2rad().sin()
    pixels = x.permute(0, 2, 3, 1).contiguous()  # a pixel's channels together: one gather for all of them
    height, width = x.shape[-2:]
    image, rows, columns = torch.arange(len(x)), torch.arange(height), torch.arange(width)
    smeared = torch.zeros_like(pixels)
    for i, weight in enumerate(weights.tolist()):
        y = (rows + (i * step_y - 0.5).ceil().long()[:, None]).clamp_(0, height - 1)
        x_ = (columns + (i * step_x - 0.5).ceil().long()[:, None]).clamp_(0, width - 1)
        smeared.add_(pixels[image[:, None, None], y[:, :, None], x_[:, None, :]], alpha=weight)
    return smeared.permute(0, 3, 1, 2)


def zoom_blur(x: Tensor, factors: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Average the image with itself, enlarged by each of these factors."""
    return (x + sum(_enlarge(x, factor) for factor in factors)) / (len(factors) + 1)


def _enlarge(x: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of the images, linearly, to their own size."""
    rows, columns = (torch.from_numpy(_zoom_matrix(size, factor)).to(x.dtype) for size in x.shape[-2:])
    return rows @ x @ columns.mT


@functools.cache
def _zoom_matrix(size: int, factor: float) -> np.ndarray:
    """Return the matrix (size, size) that enlarges the middle of a line of pixels: zooming is linear."""
    kept = math.ceil(size / factor)
    start = (size - kept) // 2
    enlarged = ndimage.zoom(np.eye(size)[start : start + kept], (factor, 1), order=1)
    trim = (len(enlarged) - size) // 2
    return enlarged[trim : trim + size]


def glass_blur(x: Tensor, settings: tuple[float, int], generator: torch.Generator) -> Tensor:
    """Smooth, replace each pixel by a neighbour or itself, smooth (standard deviation [pixels], rounds).

    The paper swaps pixels. The released code, and so the published images, overwrite one with the other, where the
    other lies above, to the left, or both: of pixels that are visited from the last to the first, it is still the old
    one, so that a round is one gather. The first two rows and columns stay.
    """
    std, rounds = settings
    pixels = gaussian_blur(x, std, generator).permute(0, 2, 3, 1)
    height, width = x.shape[-2:]
    image, rows, columns = torch.arange(len(x))[:, None, None], torch.arange(height)[:, None], torch.arange(width)
    moved = (rows > 1) & (columns > 1)
    for _ in range(rounds):
        up, left = torch.randint(2, (2, len(x), height, width), generator=generator) * moved
        pixels = pixels[image, rows - up, columns - left]
    return gaussian_blur(pixels.permute(0, 3, 1, 2), std, generator)


# ---- weather ---------------------------------------------------------------------------------------------------------


def fog(x: Tensor, settings: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Add clouds (their strength, and how much smaller the steps of a height map get from scale to scale)."""
    strength, decay = settings
    size = 1 << (max(x.shape[-2:]) - 1).bit_length()
    clouds = plasma(len(x), size, decay, generator)[:, : x.shape[-2], : x.shape[-1]]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * clouds.unsqueeze(1)) * brightest / (brightest + strength)


def plasma(count: int, size: int, decay: float, generator: torch.Generator) -> Tensor:
    """Draw periodic height maps by the diamond-square algorithm.

    A point in the middle of four known ones gets their mean plus uniform noise in ±100² at the coarsest scale, which is
    divided by `decay` twice from scale to scale.

    Args:
        count: Number of maps, N.
        size: Height and width, a power of two [pixels].
        decay: See above.
        generator: Source of the noise.

    Returns:
        Maps (N, size, size), each from 0 to 1.
    """
    heights = torch.zeros(count, size, size)
    step, noise = size, 100.0
    while step >= 2:
        half = step // 2

        def middle(four: Tensor, noise: float = noise) -> Tensor:
            return four / 4 + noise * _uniform(tuple(four.shape), -noise, noise, generator)

        corners = heights[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        heights[:, half::step, half::step] = middle(pairs + pairs.roll(-1, 2))
        centres = heights[:, half::step, half::step]
        above = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        beside = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, ::step, half::step] = middle(above)
        heights[:, half::step, ::step] = middle(beside)
        step, noise = half, noise / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def snow(x: Tensor, settings: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Whiten the image and add flakes: normals, enlarged, those above a threshold kept, smeared downwards.

    The parameters are mean and standard deviation of the normals, enlargement, threshold, radius and standard deviation
    of the smear [pixels], and how much of the image is kept.
    """
    mean, std, factor, threshold, radius, smear, kept = settings
    flakes = _enlarge(mean + std * _normal((len(x), 1, *x.shape[-2:]), generator), factor)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp_(0, 1)
    flakes = _smear(flakes, radius, smear, _uniform((len(x),), -135, -45, generator))
    whitened = kept * x + (1 - kept) * torch.maximum(x, 1.5 * luma(x) + 0.5)
    return whitened + flakes + flakes.flip(-2, -1)


# ---- colour and contrast ---------------------------------------------------------------------------------------------


def luma(x: Tensor) -> Tensor:
    """Return the brightness of each pixel, (N, 1, H, W)."""
    return x if x.shape[1] == 1 else (x * torch.tensor(LUMA).view(-1, 1, 1)).sum(1, keepdim=True)


def brightness(x: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Add to the value of each pixel in the colour space of hue, saturation and value."""
    value = x.amax(1, keepdim=True)
    brighter = (value + shift).clamp_(0, 1)
    return torch.where(value > 0, x * (brighter / value), brighter)  # of black the hue is unknown: it becomes grey


def saturate(x: Tensor, settings: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Multiply the saturation of each pixel, and add to it; grey pixels have the hue of red."""
    factor, shift = settings
    value = x.amax(1, keepdim=True)
    below = value - x  # of each channel; value times saturation is the largest of them
    largest = below.amax(1, keepdim=True)
    saturation = torch.where(value > 0, largest / value, 0)
    wanted = (factor * saturation + shift).clamp_(0, 1) * value
    red = torch.tensor([0.0, 1.0, 1.0]).view(-1, 1, 1)
    return value - wanted * torch.where(largest > 0, below / largest, red)


def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Bring every channel of each image closer to its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


# ---- digital ---------------------------------------------------------------------------------------------------------


def jpeg_compression(x: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    """Write each image as JPEG of this quality, and read it."""

    def work(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each_picture(x, work)


def pixelate(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Shrink each image by this factor, each new pixel the mean of those under it, and enlarge it without smoothing."""
    height, width = x.shape[-2:]
    small = (int(width * factor), int(height * factor))

    def work(image: Image.Image) -> Image.Image:
        return image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)

    return _each_picture(x, work)


def _each_picture(x: Tensor, work: Any) -> Tensor:
    """Apply a function of PIL's pictures of 8 bits to each image."""
    pixels = x.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [np.asarray(work(Image.fromarray(array.squeeze(-1) if x.shape[1] == 1 else array))) for array in pixels]
    return torch.from_numpy(np.stack(pictures).reshape(pixels.shape)).permute(0, 3, 1, 2).float().div_(255)


def elastic_transform(x: Tensor, settings: tuple[float, float, float], generator: torch.Generator) -> Tensor:
    """Move three points of each image at random, and all others with them; then move pixels by smooth random fields.

    The parameters are size of the fields before they are smoothed, standard deviation that smooths them, and largest
    shift of the three points, each as a fraction of the image's shorter side.
    """
    height, width = x.shape[-2:]
    strength, std, shift = (min(height, width) * value for value in settings)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns, rows, torch.ones_like(rows)], -1).double()
    middle, reach = torch.tensor([width // 2, height // 2]).double(), min(height, width) // 3
    points = middle + reach * torch.tensor([[1, 1], [1, -1], [-1, -1]])
    moved = points + _uniform((len(x), 3, 2), -shift, shift, generator)
    # what moves the points back tells each new pixel where it comes from: (N, 3, 2) for (column, row, 1)
    back = torch.linalg.solve(torch.cat([moved, torch.ones(len(x), 3, 1)], -1), points.expand(len(x), 3, 2))
    sources = places.view(1, -1, 3) @ back
    turned = _sample(x, sources.view(len(x), height, width, 2), align_corners=True)
    fields = _uniform((2, len(x), height, width), -1, 1, generator).numpy()
    fields = ndimage.gaussian_filter(fields, (0, 0, std, std), mode="reflect", truncate=3)
    offsets = strength * torch.from_numpy(fields).permute(1, 2, 3, 0).double()
    return _sample(turned, places[..., :2] + offsets, align_corners=False)


def _sample(x: Tensor, places: Tensor, *, align_corners: bool) -> Tensor:
    """Interpolate linearly at places (N, H, W, 2), column and row [pixels]; outside, images are mirrored.

    They are mirrored at the centres of the outermost pixels with `align_corners`, else at their outer edges.
    """
    size = torch.tensor([x.shape[-1], x.shape[-2]]).double()
    grid = 2 * places / (size - 1) - 1 if align_corners else (2 * places + 1) / size - 1
    return grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="reflection", align_corners=align_corners)
