"""Every corruption against a reference that goes through one image, or one pixel, after the other in float64."""

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy import fft, ndimage, signal, stats
from torch import Tensor

from experiments import corruption_kinds as kinds
from experiments.corruptions import CORRUPTIONS, SEVERITIES

ALPHA = 1e-6  # chance that a correct sampler fails on a fresh seed, per test


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 3, channels: int = 3, height: int = 12, width: int = 12, seed: int = 0) -> Tensor:
    """Random pixels in [0, 1], neighbours correlated, so that edges, blur and shifts all show."""
    rough = np.random.default_rng(seed).random((count, channels, height, width))
    smooth = ndimage.gaussian_filter(rough, (0, 0, 0.7, 0.7))
    low, high = smooth.min((2, 3), keepdims=True), smooth.max((2, 3), keepdims=True)
    return torch.from_numpy((smooth - low) / (high - low)).float()


def parameters(name: str) -> list[object]:
    return list(CORRUPTIONS[name].parameters)


def assert_near(found: Tensor, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    assert found.dtype == torch.float32 and tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=tolerance)


# ---- noise: the law of what is added ------------------------------------------------------------------------------


def chi_square_passes(statistic: float, degrees: int) -> bool:
    return bool(stats.chi2.ppf(ALPHA / 2, degrees) < statistic < stats.chi2.isf(ALPHA / 2, degrees))


@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_added_noise_has_the_published_standard_deviation(name: str, severity: int) -> None:
    x = images(20, height=32, width=32).clamp(min=0.1)
    std = parameters(name)[severity - 1]
    noise = (CORRUPTIONS[name].apply(x, std, seeded(severity)) - x).double()
    standard = noise / (std * (x.double() if name == "speckle_noise" else 1))
    for wrong, expected in ((1.0, True), (1.02, False)):  # 2 % more must not pass
        assert chi_square_passes(float((standard * wrong).square().sum()), x.numel()) == expected
    assert abs(float(standard.mean())) * math.sqrt(x.numel()) < stats.norm.isf(ALPHA / 2)


@pytest.mark.parametrize("photons", [500, 50])
def test_shot_noise_counts_photons(photons: int) -> None:
    x = images(20, height=32, width=32).clamp(min=0.3)
    counts = (kinds.shot_noise(x, photons, seeded()) * photons).double()
    np.testing.assert_allclose(counts, counts.round(), rtol=0, atol=1e-3)
    rate = x.double() * photons
    dispersion = ((counts - rate) ** 2 / rate).sum().item()
    # Var[(k - r)²/r] = 2 + 1/r for Poisson k, so the sum is normal with that variance
    spread = math.sqrt(float((2 + 1 / rate).sum()))
    assert abs(dispersion - x.numel()) < stats.norm.isf(ALPHA / 2) * spread
    assert abs(1.05 * dispersion - x.numel()) > stats.norm.isf(ALPHA / 2) * spread
    assert abs(float((counts - rate).sum())) < stats.norm.isf(ALPHA / 2) * math.sqrt(float(rate.sum()))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulses_hit_the_published_fraction_of_the_values(severity: int) -> None:
    x = images(40, height=32, width=32).clamp(0.1, 0.9)
    amount = parameters("impulse_noise")[severity - 1]
    found = kinds.impulse_noise(x, amount, seeded(severity))
    hit = found != x
    assert set(found[hit].tolist()) == {0.0, 1.0}
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], x.numel(), amount)
    count = int(hit.sum())
    assert low <= count <= high and not low <= round(count * 1.25) <= high
    low, high = stats.binom.ppf([ALPHA / 2, 1 - ALPHA / 2], count, 0.5)
    assert low <= int((found[hit] == 1).sum()) <= high


# ---- blur ------------------------------------------------------------------------------------------------------------


def blur_matrix(size: int, std: float) -> np.ndarray:
    """Gaussian weights of every pixel of a line for every other, edges continued; 4 standard deviations wide."""
    reach = int(4 * std + 0.5)
    matrix = np.zeros((size, size))
    weights = {d: math.exp(-(d**2) / (2 * std**2)) for d in range(-reach, reach + 1)}
    for i in range(size):
        for d, weight in weights.items():
            matrix[i, min(max(i + d, 0), size - 1)] += weight / sum(weights.values())
    return matrix


@pytest.mark.parametrize("std", parameters("gaussian_blur"))
def test_gaussian_blur(std: float) -> None:
    x = images(height=10, width=14)
    expected = blur_matrix(10, std) @ x.double().numpy() @ blur_matrix(14, std).T
    assert_near(kinds.gaussian_blur(x, std, seeded()), expected)


@pytest.mark.parametrize("sizes", parameters("defocus_blur"))
def test_defocus_blur(sizes: tuple[float, float]) -> None:
    radius, std = sizes
    y, x_ = np.mgrid[-8:9, -8:9]
    disk = ((x_**2 + y**2) <= radius**2).astype(float)
    line = np.exp(-np.array([1, 0, 1]) / (2 * std**2))
    kernel = signal.convolve2d(disk / disk.sum(), np.outer(line, line) / line.sum() ** 2, mode="same")
    x = images(2, height=20, width=18)
    expected = [[ndimage.correlate(plane, kernel, mode="mirror") for plane in image] for image in x.double().numpy()]
    assert_near(kinds.defocus_blur(x, sizes, seeded()), np.array(expected))


def smear(plane: np.ndarray, radius: float, std: float, angle: float) -> np.ndarray:
    """ImageMagick's motion blur of one plane, pixel by pixel."""
    width = 2 * math.ceil(radius) + 1
    kernel = [math.exp(-i * i / (2 * std * std)) / (math.sqrt(2 * math.pi) * std) for i in range(width)]
    along = (width * math.sin(math.radians(angle)), width * math.cos(math.radians(angle)))
    steps = [
        (math.ceil(i * along[0] / math.hypot(*along) - 0.5), math.ceil(i * along[1] / math.hypot(*along) - 0.5))
        for i in range(width)
    ]
    height, breadth = plane.shape
    found = np.zeros_like(plane)
    for y in range(height):
        for x in range(breadth):
            for (down, right), weight in zip(steps, kernel, strict=True):
                row, column = min(max(y + down, 0), height - 1), min(max(x + right, 0), breadth - 1)
                found[y, x] += weight / sum(kernel) * plane[row, column]
    return found


@pytest.mark.parametrize("sizes", parameters("motion_blur"))
def test_motion_blur(sizes: tuple[float, float]) -> None:
    x = images(4, channels=1, height=11, width=13)
    angles = (torch.rand(4, generator=seeded(0)) * 90 - 45).double().tolist()
    assert max(angles) > 0 > min(angles)
    expected = np.stack([[smear(image[0].double().numpy(), *sizes, a)] for image, a in zip(x, angles, strict=True)])
    assert_near(kinds.motion_blur(x, sizes, seeded(0)), expected)


def enlarge(plane: np.ndarray, factor: float) -> np.ndarray:
    """Zoom the middle of one plane as the published code does."""
    size = len(plane)
    kept = math.ceil(size / factor)
    top = (size - kept) // 2
    zoomed = ndimage.zoom(plane[top : top + kept, top : top + kept], factor, order=1)
    trim = (len(zoomed) - size) // 2
    return zoomed[trim : trim + size, trim : trim + size]


@pytest.mark.parametrize("factors", parameters("zoom_blur"))
def test_zoom_blur(factors: tuple[float, ...]) -> None:
    x = images(2, height=32, width=32)
    planes = x.double().numpy()
    expected = planes + sum(np.array([[enlarge(p, f) for p in image] for image in planes]) for f in factors)
    assert_near(kinds.zoom_blur(x, factors, seeded()), expected / (len(factors) + 1))


@pytest.mark.parametrize("settings", parameters("glass_blur"))
def test_glass_blur(settings: tuple[float, int]) -> None:
    """Pixel after pixel from the last to the first, as in the published code."""
    std, rounds = settings
    x = images(3, height=12, width=10)
    smooth = [blur_matrix(size, std) if 4 * std + 0.5 >= 1 else np.eye(size) for size in (12, 10)]
    pixels = smooth[0] @ x.double().numpy() @ smooth[1].T
    draws = seeded(5)
    for _ in range(rounds):
        up, left = torch.randint(2, (2, 3, 12, 10), generator=draws).numpy()
        for n in range(3):
            for row in range(11, 1, -1):
                for column in range(9, 1, -1):
                    other = row - up[n, row, column], column - left[n, row, column]
                    pixels[n, :, row, column] = pixels[(n, slice(None), *other)]
    assert_near(kinds.glass_blur(x, settings, seeded(5)), smooth[0] @ pixels @ smooth[1].T)


def test_glass_takes_each_pixel_from_one_of_four() -> None:
    places = torch.arange(600 * 600).double().view(1, 1, 600, 600)
    steps = places - kinds.glass_blur(places, (0.0, 1), seeded())
    assert not steps[..., :2, :].any() and not steps[..., :2].any()
    counts = [int((steps[..., 2:, 2:] == step).sum()) for step in (0, 1, 600, 601)]
    assert sum(counts) == 598**2
    statistic = sum((count - 598**2 / 4) ** 2 for count in counts) / (598**2 / 4)
    assert statistic < stats.chi2.isf(ALPHA, 3)


# ---- weather ---------------------------------------------------------------------------------------------------------


def plasma(size: int, decay: float, draws: torch.Generator) -> np.ndarray:
    """One height map, point by point."""
    heights = np.zeros((size, size))
    step, noise = size, 100.0

    def fill(rows: range, columns: range, around: list[tuple[int, int]]) -> None:
        wobble = (torch.rand(1, len(rows), len(columns), generator=draws).double() * 2 - 1) * noise * noise
        values = {
            (r, c): sum(heights[(r + dr) % size, (c + dc) % size] for dr, dc in around) / 4 + float(wobble[0, i, j])
            for i, r in enumerate(rows)
            for j, c in enumerate(columns)
        }
        for place, value in values.items():
            heights[place] = value

    while step >= 2:
        half = step // 2
        fill(range(half, size, step), range(half, size, step), [(a, b) for a in (-half, half) for b in (-half, half)])
        beside = [(-half, 0), (half, 0), (0, -half), (0, half)]
        fill(range(0, size, step), range(half, size, step), beside)
        fill(range(half, size, step), range(0, size, step), beside)
        step, noise = half, noise / decay
    return (heights - heights.min()) / (heights.max() - heights.min())


@pytest.mark.parametrize("settings", parameters("fog"))
@pytest.mark.parametrize("height,width", [(16, 16), (9, 12)])
def test_fog(settings: tuple[float, float], height: int, width: int) -> None:
    strength, decay = settings
    x = 0.8 * images(1, height=height, width=width)
    clouds = plasma(16, decay, seeded(1))[:height, :width]
    brightest = float(x.max())
    expected = (x.double().numpy() + strength * clouds) * brightest / (brightest + strength)
    assert_near(kinds.fog(x, settings, seeded(1)), expected, 2e-5)  # float32 sums of noise up to 10⁴


@pytest.mark.parametrize("settings", parameters("snow"))
@pytest.mark.parametrize("channels", [1, 3])
def test_snow(settings: tuple[float, ...], channels: int) -> None:
    mean, std, factor, threshold, radius, width, kept = settings
    x = images(2, channels=channels)
    draws = seeded(2)
    noise = mean + std * torch.randn(2, 1, 12, 12, generator=draws).double().numpy()
    angles = (torch.rand(2, generator=draws).double() * 90 - 135).tolist()
    planes = x.double().numpy()
    for n in range(2):
        flakes = enlarge(noise[n, 0], factor)
        flakes = smear(np.clip(np.where(flakes < threshold, 0, flakes), 0, 1), radius, width, angles[n])
        grey = planes[n][0] if channels == 1 else np.tensordot([0.299, 0.587, 0.114], planes[n], 1)
        planes[n] = kept * planes[n] + (1 - kept) * np.maximum(planes[n], grey * 1.5 + 0.5)
        planes[n] += flakes + np.rot90(flakes, 2)
    assert_near(kinds.snow(x, settings, seeded(2)), planes)


# ---- colour ----------------------------------------------------------------------------------------------------------


def in_hsv(x: Tensor, factor: float, saturation: float, value: float) -> np.ndarray:
    """Change saturation and value of each pixel by way of the standard library."""

    def clip(number: float) -> float:
        return min(max(number, 0.0), 1.0)

    def work(pixel: np.ndarray) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb(h, clip(s * factor + saturation), clip(v + value))

    return np.apply_along_axis(work, 1, x.double().numpy())


def colours() -> Tensor:
    """Random pixels, and black, white, grey and pure ones."""
    special = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0.0]])
    pixels = torch.cat([special, torch.rand(93, 3, generator=seeded())])
    return pixels.mT.reshape(1, 3, 10, 10)


@pytest.mark.parametrize("shift", parameters("brightness"))
def test_brightness(shift: float) -> None:
    assert_near(kinds.brightness(colours(), shift, seeded()), in_hsv(colours(), 1, 0, shift))
    grey = images(2, channels=1)
    assert_near(kinds.brightness(grey, shift, seeded()), np.clip(grey.double().numpy() + shift, 0, 1))


@pytest.mark.parametrize("settings", parameters("saturate"))
def test_saturate(settings: tuple[float, float]) -> None:
    assert_near(kinds.saturate(colours(), settings, seeded()), in_hsv(colours(), *settings, 0))


@pytest.mark.parametrize("factor", parameters("contrast"))
def test_contrast(factor: float) -> None:
    x = images(2)
    planes = x.double().numpy()
    means = np.array([[plane.mean() for plane in image] for image in planes])[:, :, None, None]
    assert_near(kinds.contrast(x, factor, seeded()), factor * planes + (1 - factor) * means)


# ---- digital ---------------------------------------------------------------------------------------------------------


def to_bytes(x: Tensor) -> Tensor:
    return x.mul(255).round().to(torch.uint8)


# Luminance quantisation of the JPEG standard, annex K
LUMINANCE = np.array(
    """
    16 11 10 16 24 40 51 61       12 12 14 19 26 58 60 55      14 13 16 24 40 57 69 56      14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77     24 35 55 64 81 104 113 92    49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
    """.split(),
    dtype=int,
).reshape(8, 8)


@pytest.mark.parametrize("quality", parameters("jpeg_compression"))
def test_jpeg_compression_of_grey_images(quality: int) -> None:
    """Discrete cosine transform of 8x8 blocks, coefficients rounded to multiples of the table's, and back."""
    x = images(100, 1, 32, 32)

    def blocks(values: np.ndarray) -> np.ndarray:
        return values.reshape(100, 4, 8, 4, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)

    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = np.clip((LUMINANCE * scale + 50) // 100, 1, 255)
    coefficients = fft.dctn(blocks(to_bytes(x).double().numpy() - 128.0), axes=(1, 2), norm="ortho") / table
    rounded = coefficients.round()
    expected = np.clip(fft.idctn(rounded * table, axes=(1, 2), norm="ortho") + 128, 0, 255)
    found = blocks(to_bytes(kinds.jpeg_compression(x, quality, seeded())).double().numpy())
    # where a coefficient lies halfway, integer arithmetic may round it to the other side
    clear = (np.abs(np.abs(coefficients - rounded) - 0.5) > 0.02).all((1, 2))
    assert clear.sum() > 50
    assert np.abs(found - expected)[clear].max() < 0.6  # bytes are rounded, after a transform in integers


def test_jpeg_compression_keeps_colours_coarser_than_brightness() -> None:
    grey = images(4, 1, 32, 32)
    in_colour = kinds.jpeg_compression(grey.expand(-1, 3, -1, -1), 80, seeded())
    assert (in_colour - kinds.jpeg_compression(grey, 80, seeded())).abs().max() < 1.01 / 255
    stripes = torch.full((1, 3, 32, 32), 0.2)
    stripes[:, 0, :, ::2], stripes[:, 2, :, 1::2] = 0.8, 0.8  # red and blue in turn: brightness differs, and hue
    found = kinds.jpeg_compression(stripes, 80, seeded())
    assert kinds.luma(found).std() > 0.9 * kinds.luma(stripes).std()
    assert (found[:, 0] - found[:, 2]).std() < 0.1 * (stripes[:, 0] - stripes[:, 2]).std()


@pytest.mark.parametrize("factor", parameters("pixelate"))
@pytest.mark.parametrize("channels", [1, 3])
def test_pixelate(factor: float, channels: int) -> None:
    x = images(2, channels, 32, 28)

    def down(size: int) -> np.ndarray:
        """Mean of the pixels whose centres lie under each new one."""
        small = int(size * factor)
        matrix = np.zeros((small, size))
        for i in range(small):
            low, high = (int(size / small * (i + side) + 0.5) for side in (0, 1))
            matrix[i, low:high] = 1 / (high - low)
        return matrix

    def up(size: int) -> np.ndarray:
        small = int(size * factor)
        return np.eye(small)[[int((i + 0.5) * small / size) for i in range(size)]]

    rows, columns = (up(size) @ down(size) for size in (32, 28))
    expected = rows @ to_bytes(x).double().numpy() @ columns.T
    found = to_bytes(kinds.pixelate(x, factor, seeded())).double().numpy()
    assert np.abs(found - expected).max() < 1.01  # bytes are rounded after rows and after columns


@pytest.mark.parametrize("settings", parameters("elastic_transform"))
@pytest.mark.parametrize("height,width", [(12, 12), (12, 15)])
def test_elastic_transform(settings: tuple[float, float, float], height: int, width: int) -> None:
    x = images(2, 3, height, width)
    size = min(height, width)
    strength, std, shift = (size * value for value in settings)
    draws = seeded(4)
    shifts = (torch.rand(2, 3, 2, generator=draws) * 2 - 1).double().numpy() * shift
    fields = (torch.rand(2, 2, height, width, generator=draws) * 2 - 1).double().numpy()
    middle, reach = np.array([width // 2, height // 2]), size // 3
    points = np.array([middle + reach, [middle[0] + reach, middle[1] - reach], middle - reach], float)
    rows, columns = np.mgrid[:height, :width].astype(float)
    expected = np.zeros(x.shape)
    for n, image in enumerate(x.double().numpy()):
        moved = np.column_stack([points + shifts[n], np.ones(3)])
        matrix = np.linalg.solve(moved, points)
        sources = np.stack([columns, rows, np.ones_like(rows)], -1) @ matrix
        dx, dy = (strength * ndimage.gaussian_filter(field[n], std, mode="reflect", truncate=3) for field in fields)
        for c, plane in enumerate(image):
            turned = ndimage.map_coordinates(plane, [sources[..., 1], sources[..., 0]], order=1, mode="mirror")
            expected[n, c] = ndimage.map_coordinates(turned, [rows + dy, columns + dx], order=1, mode="reflect")
    assert_near(kinds.elastic_transform(x, settings, seeded(4)), expected, 2e-5)  # float32 places
