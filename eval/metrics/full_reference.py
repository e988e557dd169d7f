"""Computes PSNR and SSIM of a generated image against its reference, as MedGEN-Bench does.

    psnr   20 log10(255 / sqrt(mean squared error)) over all channels, in dB; 100 of equal images
    ssim   structural similarity of the gray images: means over windows of 7 x 7 pixels that are
           inside the image, with the sample covariance, K1 0.01, K2 0.03, range 255

A generated image of another size is resized to the reference's by LANCZOS. SSIM is that of
scikit-image's structural_similarity with its defaults; an image needs 7 pixels on each side.
"""

import numpy as np
import PIL.Image
from scipy import ndimage

MAX_PSNR = 100.0  # of equal images
WINDOW = 7  # pixels on each side
K1, K2, RANGE = 0.01, 0.03, 255.0


def psnr(image: PIL.Image.Image, reference: PIL.Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two RGB images of one size."""
    difference = np.asarray(image, np.float32) - np.asarray(reference, np.float32)
    error = float(np.mean(difference**2))
    return MAX_PSNR if error == 0 else float(20 * np.log10(RANGE / np.sqrt(error)))


def ssim(image: PIL.Image.Image, reference: PIL.Image.Image) -> float:
    """Return the structural similarity of two images of one size."""
    if min(image.size) < WINDOW:
        raise ValueError(f"an image of {image.size} pixels has no SSIM; it needs {WINDOW} a side")
    x, y = (np.asarray(side.convert("L"), np.float64) for side in (image, reference))
    mean_x, mean_y = _mean(x), _mean(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x, var_y = (sample * (_mean(a * a) - m * m) for a, m in ((x, mean_x), (y, mean_y)))
    covariance = sample * (_mean(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    border = WINDOW // 2
    return float((luminance * structure)[border:-border, border:-border].mean())


def scores(image: PIL.Image.Image, reference: PIL.Image.Image) -> dict[str, float]:
    """Return {psnr, ssim} of a generated image, resized to its reference."""
    if image.size != reference.size:
        image = image.resize(reference.size, PIL.Image.Resampling.LANCZOS)
    return dict(psnr=psnr(image, reference), ssim=ssim(image, reference))


def _mean(pixels: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(pixels, WINDOW)
