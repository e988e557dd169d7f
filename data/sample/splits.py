"""Which group (patient, volume, slide or animal) is held out: written down, so that it never moves.

`test` holds 19 groups; every modality and, but for the pelvis, every body part in it also has a
train group. A modality with one group only is in train.
"""

TEST = frozenset({
    "film-child-1427", "film-child-1431", "film-child-1438",  # normal
    "film-child-1947", "film-child-1950", "film-child-1952",  # bacterial pneumonia
    "film-chest-rg1",
    "mri-brain-2", "mri-pd-brain", "mri-colin27", "mri-liver",
    "ct-lung-2", "ct-iv-contrast",
    "us-pelvis", "echo-cardiology", "echo-doppler",
    "slide-cmu",
    "nuclei-dsb",
    "fundus-hrf",
})  # fmt: skip
VALIDATION = frozenset({
    "film-child-1436", "film-child-1949", "mri-flair-head", "ct-scout-chest", "slide-stardist",
})  # fmt: skip


def split_of(group: str) -> str:
    """The split of a group: "test", "validation" or "train"."""
    return "test" if group in TEST else "validation" if group in VALIDATION else "train"
