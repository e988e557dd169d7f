"""Define the MedMax mixture: thirteen sources and six tasks, as published; and the embedded sample.

This is the only such table. Percentages are those of the authors' two charts, printed to 0.1;
instances are percent x 1.47M, itself rounded to 10K, so `expected` is a range. `noted` holds counts
in thousands from a summary of the paper, rounded as the summary gives them. The charts agree with
each other and with the notes, with these exceptions:

    captioning : generation   18.3 % : 3.4 % in the chart, 160K : 160K in the notes
    PMC-OA, Quilt-1M          the notes count captioning and generation only (83K, 100K); the
                              chart's 147K and 122K include interleaved generation too
    interleaved generation    86.7K in the chart, 88K in the notes

`licence` is what the source's own publisher states; Apache-2.0 on the card of medmax_data does not
replace it. `data_class`: open, licence-bound (terms or a gate beyond attribution, or none stated),
or credentialed. `credential` is that column of the MedMax release: which rows have yes is not
published. `weight`: how often an epoch contains a document; MedMax draws each once. `python -m
data.mixture` prints the tables; docs/reference/data_sources.md states where each license was read.
"""

import dataclasses

# Rows of the released parquet. Of single benchmarks only the sum of two is public, on the card of
# cmcheng/MedMax-VQA-SFT_Qwen2.5-VL-7B; the viewer rounds the total to 9.47k.
RELEASED_ROWS = (9_465, 9_474)
RELEASED_TOGETHER = (("vqa_rad", "pathvqa"), 2_451)

INSTANCES = 1_470_000  # MedMax's README
_ROUNDING = 5_000  # of INSTANCES
OPEN, BOUND, CREDENTIALED = "open", "licence-bound", "credentialed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One source. `percent` None: not part of MedMax. `credential`: yes, no, or unknown."""

    name: str
    percent: float | None
    domain: str
    knowledge_base: str
    tasks: tuple[str, ...]
    licence: str
    data_class: str
    noted: int | None = None
    credential: str = "unknown"
    weight: float = 1.0

    @property
    def instances(self) -> int | None:
        """Return the approximate number of instances, computed from the percentage."""
        return None if self.percent is None else round(self.percent / 100 * INSTANCES)

    @property
    def expected(self) -> tuple[int, int] | None:
        """Return the fewest and the most documents that round to the chart's percentage."""
        if self.percent is None:
            return None
        low = (self.percent - 0.05) / 100 * (INSTANCES - _ROUNDING)
        high = (self.percent + 0.05) / 100 * (INSTANCES + _ROUNDING)
        return round(low), round(high)


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
        licence="not stated; articles of the PMC open-access subset",
        data_class=BOUND,
        noted=83_000,
        percent=10.0,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CAPTION, GENERATION, INTERLEAVED),
    ),
    Source(
        name="LLaVA-Med-PMC",
        licence="CC BY-NC 4.0, research only",
        data_class=BOUND,
        noted=37_000,
        percent=2.5,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CAPTION, GENERATION),
    ),
    Source(
        name="Quilt-1M",
        licence="on request: research only, no redistribution",
        data_class=BOUND,
        noted=100_000,
        percent=8.3,
        domain="histopathology",
        knowledge_base="YouTube",
        tasks=(CAPTION, GENERATION, INTERLEAVED),
    ),
    Source(
        name="PubMedVision-Alignment",
        licence="Apache-2.0",
        data_class=OPEN,
        noted=100_000,
        percent=6.8,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CAPTION, GENERATION),
    ),
    Source(
        name="LLaVA-Med-IT",
        licence="CC BY-NC 4.0, research only",
        data_class=BOUND,
        noted=76_000,
        percent=5.2,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CHAT,),
    ),
    Source(
        name="PubMedVision-IT",
        licence="Apache-2.0",
        data_class=OPEN,
        noted=504_000,
        percent=34.2,
        domain="diverse",
        knowledge_base=PUBMED,
        tasks=(CHAT,),
    ),
    Source(
        name="Quilt-Instruct",
        licence="CC BY-NC-ND 3.0, gated",
        data_class=BOUND,
        noted=107_000,
        percent=7.3,
        domain="histopathology",
        knowledge_base="YouTube",
        tasks=(CHAT,),
    ),
    Source(
        name="VQA-RAD",
        licence="CC0 1.0",
        data_class=OPEN,
        percent=0.1,
        domain="radiology",
        knowledge_base="MedPix",
        tasks=(VQA,),
    ),
    Source(
        name="SLAKE",
        licence="CC BY 4.0",
        data_class=OPEN,
        percent=0.3,
        domain="radiology",
        knowledge_base="MSD, CXR-8, CHAOS",
        tasks=(VQA,),
    ),
    Source(
        name="PathVQA",
        licence="MIT; the images belong to their publishers",
        data_class=BOUND,
        percent=1.3,
        domain="pathology",
        knowledge_base="PEIR",
        tasks=(VQA,),
    ),
    Source(
        name="PMC-VQA",
        licence="CC BY-SA",
        data_class=BOUND,
        percent=12.1,
        domain="radiology",
        knowledge_base="PMC",
        tasks=(VQA,),
    ),
    Source(
        name="OmniMedVQA",
        licence="not stated; that of each of its 42 open datasets",
        data_class=BOUND,
        noted=81_000,
        percent=5.5,
        domain="diverse",
        knowledge_base="not stated",
        tasks=(VQA,),
    ),
    Source(
        name="MIMIC-CXR",
        percent=6.3,
        domain="chest X-ray",
        knowledge_base="MIMIC-CXR",
        tasks=(REPORT,),
        credential="yes",
        licence="PhysioNet credentialed access",
        data_class=CREDENTIALED,
        noted=92_000,
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
    data_class=OPEN,
)


BY_NAME = {source.name: source for source in SOURCES}
CAPTION_SHARE = TASKS[CAPTION] / (TASKS[CAPTION] + TASKS[GENERATION])  # the chart's, not the notes'


def compare(name: str, documents: int) -> str:
    """Describe how far a build of one source is from the number that MedMax took from it."""
    source = BY_NAME[name]
    low, high = source.expected
    text = (
        f"{name}: {documents:,} documents; {source.percent} % in the chart is {low:,} to {high:,}"
    )
    if source.noted:
        text += f", the notes state {source.noted // 1000}K"
    if documents < low:
        return f"{text}: {low - documents:,} fewer ({documents / low:.1%} of the lower bound)"
    if documents > high:
        return f"{text}: {documents - high:,} more ({documents / high:.1%} of the upper bound)"
    return f"{text}: within rounding"


def markdown() -> str:
    """Return the tables of docs/reference/data_sources.md."""
    counts = ["| source | % | documents by the chart | notes | weight |", "|---|---|---|---|---|"]
    content = ["| source | domain | from | tasks |", "|---|---|---|---|"]
    terms = ["| source | credential | class | license |", "|---|---|---|---|"]
    for s in (*SOURCES, SAMPLE):
        share = "-" if s.percent is None else f"{s.percent:.1f}"
        expected = "-" if s.expected is None else "{:,} to {:,}".format(*s.expected)
        noted = f"{s.noted // 1000}K" if s.noted else "-"
        counts.append(f"| {s.name} | {share} | {expected} | {noted} | {s.weight:g} |")
        content.append(f"| {s.name} | {s.domain} | {s.knowledge_base} | {', '.join(s.tasks)} |")
        terms.append(f"| {s.name} | {s.credential} | {s.data_class} | {s.licence} |")
    return "\n".join((*counts, "", *content, "", *terms))


if __name__ == "__main__":
    print(markdown())
