"""Which modality pictures look like, by the VQGAN's codes and pixels: see score_image.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import score_image, stats, tasks
from medmax_jax import generate
from medmax_jax.io import image_paths


def centroids(
    generator: generate.Generator,
    pictures: Sequence[tuple[str, str]],
    *,
    images_folder: str | Path,
) -> score_image.Centroids:
    """Of training pictures (path, modality), each through the VQGAN as generated ones are."""
    found = looks(generator, [path for path, _ in pictures], images_folder=images_folder)
    return score_image.fit(found, [kind for _, kind in pictures])


def looks(
    generator: generate.Generator, paths: Sequence[str], *, images_folder: str | Path
) -> list[np.ndarray]:
    """Features of picture files."""
    files = [image_paths.resolve(images_folder, path) for path in paths]
    codes = generate.encode(generator, files)
    return [
        _features(generator, code, np.asarray(picture))
        for code, picture in zip(codes, generate.decode(generator, codes), strict=True)
    ]


def ceiling(
    generator: generate.Generator,
    items: Sequence[tasks.Item],
    centroids: score_image.Centroids,
    *,
    images_folder: str | Path,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """How often real pictures of the items match their own modality: the most that drawing can."""
    real = {item.image: item for item in items if item.kind}
    found = looks(generator, list(real), images_folder=images_folder)
    return stats.mean_interval(
        [
            float(score_image.nearest(centroids, one) == item.kind)
            for one, item in zip(found, real.values(), strict=True)
        ],
        [item.group for item in real.values()],
        seed=seed,
        resamples=resamples,
    ).row()


def by(
    generator: generate.Generator, centroids: score_image.Centroids
) -> Callable[[np.ndarray, np.ndarray], str]:
    """(codes, pixels) -> the name of the nearest centroid."""
    return lambda codes, picture: score_image.nearest(
        centroids, _features(generator, codes, picture)
    )


def _features(generator, codes: np.ndarray, picture: np.ndarray) -> np.ndarray:
    return score_image.features(codes, picture, num_codes=generator.vocab.image_codes)
