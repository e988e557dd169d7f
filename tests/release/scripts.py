"""Data of the stubs of run_release.py next to raw_outputs.py: chat rows, cosines, outputs."""

import math

KINDS = ("conversation", "detailed_description")
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
REPLIES = ("8 7\nGood.", "9 9.5", "10 10", "5 0", "1 10\nMuch better.")


def chat_row(n: int) -> tuple[str, dict, str]:
    """Question type, the benchmark's answer, the judge's reply; every seventh has no domain."""
    flags = {name: n % 7 != 6 and n % 5 == i for i, name in enumerate(DOMAINS)}
    answer = {
        "fig_label": f"F{n}",
        "fig_caption": "A scan.",
        "in_text_mention": "See the scan.",
        "gpt4_answer": "It is a scan.",
        "domain": flags,
    }
    return KINDS[n % 3 == 0], answer, REPLIES[n % len(REPLIES)]


CHAT = [chat_row(n) for n in range(60)]
COSINES = [math.cos(n) / 3 for n in range(130)]
# Some answers have no image, some two, and one is a text that ends like the name of an image.
OUTPUTS = [
    [["a"], ["a", "b.png"], ["a", "b.png", "c", "d.png"], ["see fig.png"]][n % 4] for n in range(40)
]
