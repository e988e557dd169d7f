"""Classifies whether an image has the requested modality; a score with a known upper bound.

    features    square roots of the code histogram (unit length), and the image on an 8 x 8 grid
    centroids   the mean of the features of the training images of each modality
    match       the nearest centroid has the name of the requested modality

Real held-out images are classified in the same way, so their share of matches is the upper bound.
This is NOT BiomedCLIPScore: it depends on texture and layout, has no knowledge of anatomy, and is
not comparable with anything published.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from medmax_jax.generation import model_bundle
from medmax_jax.storage import image_paths

GRID = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Centroids:
    """Holds one mean of features per modality."""

    names: tuple[str, ...]
    means: Float[np.ndarray, "n f"]


def features(
    codes: Int[np.ndarray, "K"], image: UInt8[np.ndarray, "h w 3"], *, num_codes: int
) -> Float[np.ndarray, "f"]:
    """Return a histogram part of length 1, and pixels in [-1, 1] scaled to length at most 1."""
    histogram = np.bincount(codes.reshape(-1), minlength=num_codes) / codes.size
    rows, columns = (np.linspace(0, n, GRID + 1).astype(int) for n in image.shape[:2])
    if min(image.shape[:2]) < GRID:
        raise ValueError(
            f"an image has {image.shape[:2]} pixels; required are at least {GRID} per side"
        )
    sums = np.add.reduceat(
        np.add.reduceat(image.astype(np.float64), rows[:-1], axis=0), columns[:-1], axis=1
    )
    area = np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None]
    pixels = sums / area / 127.5 - 1  # [GRID, GRID, 3]
    return np.concatenate([np.sqrt(histogram), pixels.reshape(-1) / np.sqrt(pixels.size)])


def fit_centroids(
    image_features: Sequence[Float[np.ndarray, "f"]], names: Sequence[str]
) -> Centroids:
    """Return the centroids of the features of training images and their modalities."""
    if len(image_features) != len(names) or not names:
        raise ValueError(
            f"{len(image_features)} images but {len(names)} modalities; pass one modality per image"
        )
    modalities = tuple(sorted(set(names)))
    where = np.array([modalities.index(name) for name in names])
    table = np.stack(image_features)
    return Centroids(
        modalities, np.stack([table[where == i].mean(0) for i in range(len(modalities))])
    )


def nearest_centroid(centroids: Centroids, vector: Float[np.ndarray, "f"]) -> str:
    """Return the modality whose centroid is nearest."""
    return centroids.names[int(((centroids.means - vector) ** 2).sum(1).argmin())]


# ---- Predicted modalities of images, from the VQGAN's codes and pixels: see above ----


def centroids(
    generator: model_bundle.ModelBundle,
    training_images: Sequence[tuple[str, str]],
    *,
    images_folder: str | Path,
) -> Centroids:
    """Return the centroids of training images (path, modality).

    Each image passes through the VQGAN, as generated images do.
    """
    image_features = modality_features(
        generator, [path for path, _ in training_images], images_folder=images_folder
    )
    return fit_centroids(image_features, [modality for _, modality in training_images])


def modality_features(
    generator: model_bundle.ModelBundle, paths: Sequence[str], *, images_folder: str | Path
) -> list[np.ndarray]:
    """Return the features of image files, in the view of answers, as generated images have."""
    files = [image_paths.resolve(images_folder, path) for path in paths]
    codes = model_bundle.encode(generator, files, view=generator.vq_config.answer_view)
    return [
        _features(generator, code, np.asarray(image))
        for code, image in zip(codes, model_bundle.decode(generator, codes), strict=True)
    ]


def make_classifier(
    generator: model_bundle.ModelBundle, centroids: Centroids
) -> Callable[[np.ndarray, np.ndarray], str]:
    """Return a function (codes, pixels) -> name of the nearest centroid."""
    return lambda codes, image: nearest_centroid(centroids, _features(generator, codes, image))


def _features(generator, codes: np.ndarray, image: np.ndarray) -> np.ndarray:
    return features(codes, image, num_codes=generator.vocab.image_codes)
