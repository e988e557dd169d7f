"""What MedMax is mixed of: thirteen sources and six tasks, as published; and the embedded sample.

Percentages are those of the authors' charts; counts are percent x 1.47M, so approximate. The two
tables come from two charts and agree to rounding. Licence "card: Apache-2.0" is what the card of
medmax_data says of the whole; the terms of each source hold too. `python -m data.mixture` prints
the table.
"""

import dataclasses

INSTANCES = 1_470_000  # MedMax's README


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One source. `percent` None: no part of MedMax. `credential`: yes, no, or unknown."""

    name: str
    percent: float | None
    domain: str
    knowledge_base: str
    tasks: tuple[str, ...]
    credential: str = "unknown"
    licence: str = "card: Apache-2.0"

    @property
    def instances(self) -> int | None:
        """About how many, from the percentage."""
        return None if self.percent is None else round(self.percent / 100 * INSTANCES)


CHAT, VQA, CAPTION, GENERATION, REPORT, INTERLEAVED = (
    "Visual Chat",
    "VQA",
    "Image Captioning",
    "Image Generation",
    "Report Understanding",
    "Multimodal Generation",
)
TASKS = {  # percent of instances
    CHAT: 46.7,
    VQA: 19.4,
    CAPTION: 18.3,
    REPORT: 6.3,
    INTERLEAVED: 5.9,
    GENERATION: 3.4,
}
PUBMED = "PubMed Central"
SOURCES = (
    Source(
        name="PMC-OA",
        percent=10.0,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CAPTION, GENERATION, INTERLEAVED),
    ),
    Source(
        name="LLaVA-Med-PMC",
        percent=2.5,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CAPTION, GENERATION),
    ),
    Source(
        name="Quilt-1M",
        percent=8.3,
        domain="histopathology",
        knowledge_base="YouTube",
        tasks=(CAPTION, GENERATION, INTERLEAVED),
    ),
    Source(
        name="PubMedVision-Alignment",
        percent=6.8,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CAPTION, GENERATION),
    ),
    Source(
        name="LLaVA-Med-IT",
        percent=5.2,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CHAT,),
    ),
    Source(
        name="PubMedVision-IT",
        percent=34.2,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CHAT,),
    ),
    Source(
        name="Quilt-Instruct",
        percent=7.3,
        domain="histopathology",
        knowledge_base="YouTube",
        tasks=(CHAT,),
    ),
    Source(name="VQA-RAD", percent=0.1, domain="radiology", knowledge_base="MedPix", tasks=(VQA,)),
    Source(
        name="SLAKE",
        percent=0.3,
        domain="radiology",
        knowledge_base="MSD, CXR-8, CHAOS",
        tasks=(VQA,),
    ),
    Source(name="PathVQA", percent=1.3, domain="pathology", knowledge_base="PEIR", tasks=(VQA,)),
    Source(name="PMC-VQA", percent=12.1, domain="radiology", knowledge_base="PMC", tasks=(VQA,)),
    Source(
        name="OmniMedVQA", percent=5.5, domain="diverse", knowledge_base="not stated", tasks=(VQA,)
    ),
    Source(
        name="MIMIC-CXR",
        percent=6.3,
        domain="chest X-ray",
        knowledge_base="MIMIC-CXR",
        tasks=(REPORT,),
        credential="yes",
        licence="PhysioNet credentialed access",
    ),
)
SAMPLE = Source(
    name="embedded sample",
    percent=None,
    domain="diverse",
    knowledge_base="open-source packages, see data/sample/NOTICE",
    tasks=(CHAT, VQA, CAPTION, GENERATION, REPORT, INTERLEAVED),
    credential="no",
    licence="by image, in data/sample/manifest.jsonl",
)


def markdown() -> str:
    """The table of the README."""
    lines = [
        "| source | % | about | domain | from | tasks | credential | licence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in (*SOURCES, SAMPLE):
        share = "-" if s.percent is None else f"{s.percent:.1f}"
        about = "-" if s.instances is None else f"{s.instances / 1e3:.3g}K"
        cells = (s.name, share, about, s.domain, s.knowledge_base, ", ".join(s.tasks))
        lines.append(f"| {' | '.join((*cells, s.credential, s.licence))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
