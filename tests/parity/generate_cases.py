"""What HF's generate and ours are asked; numpy only, so both sides make the same prompts."""

import chameleon_cases as cases
import numpy as np

NEW, PENALTY = 24, 1.2


def prompts() -> list[np.ndarray]:
    """An image before the question, words alone, and words before an image; of unlike length."""
    first, second = cases.ids()
    return [first[:40], second[:9], second[np.r_[0, 12 : cases.TOKENS - 1]]]
