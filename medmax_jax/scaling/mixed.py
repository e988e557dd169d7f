"""Fit the law of two modalities in one model, with their competition (Aghajanyan et al. 2023).

arXiv 2301.03728:

    L(N, D_t, D_i) = [L_t(N, D_t) + L_i(N, D_i)] / 2 - C + A / N^alpha + B / (D_t + D_i)^beta

L_t and L_i are Chinchilla laws of runs on one modality alone: rows with tokens_image = 0 and with
tokens_text = 0. C is the benefit of the modalities to each other at scale, the remaining terms are
their competition in a small model; the barrier is where both are equal. `loss` is the mean of the
two losses.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from medmax_jax.scaling import diagnostics
from medmax_jax.scaling import fit as fitting
from medmax_jax.scaling.fit import Fit
from medmax_jax.scaling.laws import LAWS, Columns, Exponent, Law, ScalingError, Terms
from medmax_jax.scaling.table import Table

COLUMNS = ("params", "tokens_text", "tokens_image")


def _terms(e: tuple, x: Columns) -> Terms:
    n, d = -e[0] * np.log(x["params"]), -e[1] * np.log(x["tokens"])
    return np.log(x["alone"]) + np.zeros_like(n), np.zeros_like(n), n, d


INTERACTION = Law(
    name="mixed_modal",
    formula="(L_text + L_image)/2 - C + A/N^alpha + B/(D_text + D_image)^beta",
    paper="Aghajanyan et al. 2023, arXiv 2301.03728",
    columns=("params", "tokens", "alone"),
    names=("alone", "C", "A", "B"),
    signs=(1, -1, 1, 1),
    exponents=(
        Exponent(name="alpha", low=1e-3, high=2.5, points=30, log=False, column="params"),
        Exponent(name="beta", low=1e-3, high=2.5, points=30, log=False, column="tokens"),
    ),
    terms=_terms,
    log=True,
)
# The columns that table.read requires.
LAW = dataclasses.replace(INTERACTION, columns=COLUMNS, zeros=COLUMNS[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """The three fits."""

    text: Fit
    image: Fit
    both: Fit

    @property
    def values(self) -> dict[str, float]:
        """Return text_E, text_A, ..., image_E, ..., C, A, B, alpha, beta."""
        named = {}
        for part in ("text", "image"):
            named |= {f"{part}_{k}": v for k, v in getattr(self, part).values.items()}
        return named | {k: v for k, v in self.both.values.items() if k != "alone"}

    def predict(self, x: Columns) -> Float[np.ndarray, "n"]:
        """Return predictions for mixed rows only."""
        return self.both.predict(_with_alone(x, self.text, self.image))

    def competes(self, x: Columns) -> Float[np.ndarray, "n"]:
        """Return values above 0 where the modalities' competition exceeds their benefit."""
        v = self.both.values
        tokens = x["tokens_text"] + x["tokens_image"]
        return v["A"] / x["params"] ** v["alpha"] + v["B"] / tokens ** v["beta"] - v["C"]


def fit(table: Table, *, delta: float) -> Mixed:
    """Fit the laws of each modality alone, then of both."""
    text, image, both = parts(table)
    for name, part, law in (
        ("text", text, LAWS["chinchilla"]),
        ("image", image, LAWS["chinchilla"]),
        ("both", _plain(both), dataclasses.replace(INTERACTION, names=("C", "A", "B"))),
    ):
        try:
            diagnostics.check(law, part, {})
        except ScalingError as error:
            raise ScalingError(f"mixed_modal, rows of {name}: {error}") from error
    alone = [
        fitting.fit(LAWS["chinchilla"], p.x, p.y, delta=delta, fixed={}) for p in (text, image)
    ]
    x = _with_alone(both.x, *alone)
    together = fitting.fit(INTERACTION, x, both.y, delta=delta, fixed={"alone": 1.0})
    return Mixed(text=alone[0], image=alone[1], both=together)


def bootstrap_samples(
    fitted: Mixed,
    table: Table,
    *,
    count: int,
    seed: int,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, np.ndarray]:
    """Return each parameter's draws; runs are drawn within each of the three groups of rows.

    `progress` receives how many more of the 3 x `count` fits are done.
    """
    rng, groups = np.random.default_rng(seed), parts(table)
    drawn = [[diagnostics.counts(rng, len(part)) for part in groups] for _ in range(count)]
    weights = [np.array(each) for each in zip(*drawn, strict=True)]
    alone = [
        fitting.refit(law, part.x, part.y, w, progress)[0]
        for law, part, w in zip((fitted.text, fitted.image), groups, weights, strict=False)
    ]
    x = dict(_with_alone(groups[2].x, fitted.text, fitted.image))
    x["alone"] = sum(
        np.real(fitting.predict(law.law, vectors.T, column, law.middle))
        for law, vectors, column in zip(
            (fitted.text, fitted.image), alone, _each_alone(groups[2].x), strict=True
        )
    ) / 2  # fmt: skip
    both, _ = fitting.refit(fitted.both, x, groups[2].y, weights[2], progress)
    rows = [
        Mixed(
            text=dataclasses.replace(fitted.text, vector=text),
            image=dataclasses.replace(fitted.image, vector=image),
            both=dataclasses.replace(fitted.both, vector=vector),
        ).values
        for text, image, vector in zip(*alone, both, strict=True)
    ]
    return {name: np.array([row[name] for row in rows]) for name in fitted.values}


def parts(table: Table) -> tuple[Table, Table, Table]:
    """Return (text alone, image alone, both); the first two as tables of `params` and `tokens`."""
    text, image = table.x["tokens_text"] > 0, table.x["tokens_image"] > 0
    alone = [
        _as_tokens(table.part(text & ~image), "tokens_text"),
        _as_tokens(table.part(image & ~text), "tokens_image"),
    ]
    return alone[0], alone[1], table.part(text & image)


def _as_tokens(part: Table, name: str) -> Table:
    return dataclasses.replace(part, x={"params": part.x["params"], "tokens": part.x[name]})


def _plain(both: Table) -> Table:
    x: Mapping[str, np.ndarray] = both.x
    total = x["tokens_text"] + x["tokens_image"]
    return dataclasses.replace(both, x={"params": x["params"], "tokens": total})


def _with_alone(x: Columns, text: Fit, image: Fit) -> dict[str, np.ndarray]:
    """Return the columns of INTERACTION."""
    separate = (law.predict(each) for law, each in zip((text, image), _each_alone(x), strict=True))
    return {
        "params": x["params"],
        "tokens": x["tokens_text"] + x["tokens_image"],
        "alone": sum(separate) / 2,
    }


def _each_alone(x: Columns) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the columns of the laws of text and of image alone."""
    text, image = (
        {"params": x["params"], "tokens": x[name]} for name in ("tokens_text", "tokens_image")
    )
    return text, image
