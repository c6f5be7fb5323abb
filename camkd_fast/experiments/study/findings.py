"""Statistics of results: means, paired differences and the conclusions from them, without layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from ...train.strategies import CAMKD, STRATEGIES, find
from . import cells
from .paired import Paired
from .records import Results
from .spec import Pool, Student, Variant
from .work import Record

PAPER_GAIN = 0.8  # points over AVER that arXiv 2201.00007 reports on average
Place = tuple[Pool, Student]


@dataclass(frozen=True)
class Findings:
    """Statistics of the records by pool, student and variant."""

    results: Results

    @property
    def places(self) -> list[Place]:
        """All combinations of pool and student, in the study's order."""
        return list(dict.fromkeys((pool, student) for pool, student, _ in cells.comparisons(self.results.study)))

    def variants(self, table: str) -> list[Variant]:
        return [variant for variant in self.results.study.variants if variant.table == table]

    def has(self, place: Place, variant: Variant) -> bool:
        """Whether the study includes the variant at this place."""
        return (*place, variant) in list(cells.comparisons(self.results.study))

    def records(self, place: Place, variant: Variant) -> dict[int, Record]:
        """Finished cells by seed."""
        study, done = self.results.study, self.results.cells
        found = {seed: cells.locate(*place, variant, seed) for seed in study.seeds}
        return {seed: done[cell] for seed, cell in found.items() if cell in done}

    def accuracies(self, place: Place, variant: Variant) -> dict[int, float]:
        """Test accuracy in percent by seed."""
        return {seed: 100 * record["test_accuracy"] for seed, record in self.records(place, variant).items()}

    def gains(self, place: Place, variant: Variant, against: Variant | None = None) -> dict[int, float]:
        """Percentage points over another variant, by default `variant.against`, for seeds that both have."""
        other = self.accuracies(place, against or self.results.study.variant(variant.against))
        return {s: accuracy - other[s] for s, accuracy in self.accuracies(place, variant).items() if s in other}

    def paired(self, places: Iterable[Place], variant: Variant, against: Variant | None = None) -> Paired | None:
        """Difference per seed, averaged over the places, for seeds that are complete at every place.

        None if the variant is in none of the places or no seed is complete.
        """
        other = against or self.results.study.variant(variant.against)
        gains = [
            self.gains(place, variant, other) for place in places if self.has(place, variant) and self.has(place, other)
        ]
        seeds = [seed for seed in self.results.study.seeds if gains and all(seed in there for there in gains)]
        return Paired([mean(there[seed] for there in gains) for seed in seeds]) if seeds else None

    def outcomes(self, places: Iterable[Place], variant: Variant) -> tuple[int, int, int]:
        """Wins, ties and losses over places and seeds, each a pair of runs."""
        return Paired([gain for place in places for gain in self.gains(place, variant).values()]).outcomes

    def mean_accuracy(self, places: Iterable[Place], variant: Variant) -> float | None:
        """Mean over places and seeds in percent; None while a place of the study has no results."""
        found = [self.accuracies(place, variant) for place in places if self.has(place, variant)]
        if not found or not all(found):
            return None
        return mean(mean(accuracies.values()) for accuracies in found)

    def confident(self) -> list[Variant]:
        """CA-MKD with feature maps, in the main table."""
        return [variant for variant in self.variants("main") if variant.strategy == CAMKD.name]

    def weighed(self) -> list[tuple[Variant, Variant]]:
        """Pairs of main-table variants with the same losses: with weights, and with equal weights."""
        main = {variant.strategy: variant for variant in self.variants("main")}
        pairs = [(name, kind.unweighted) for name, kind in STRATEGIES.items() if kind.unweighted is not None]
        return [(main[one], main[other]) for one, other in pairs if one in main and other in main]

    def groups(self) -> dict[str, list[Place]]:
        """Places grouped by whether the pool has a bad teacher; empty groups are left out."""
        study = self.results.study
        found = {
            "good teachers only": [place for place in self.places if not study.bad(place[0])],
            "a bad teacher": [place for place in self.places if study.bad(place[0])],
        }
        return {name: places for name, places in found.items() if places}


def conclusions(findings: Findings) -> list[str]:
    """Conclusions as sentences, generated from the numbers by fixed rules."""
    results = findings.results
    missing, total = len(results.missing), len(results.missing) + len(results.cells)
    if not results.cells:
        return [f"The study has not been run: all {total} cells are missing, and nothing can be concluded."]
    said = [f"{missing} of {total} cells are missing; the following is about the others."] if missing else []
    verdicts = _verdicts(findings)
    if not verdicts:
        return [*said, "No comparison has two seeds yet, so nothing can be concluded."]
    return [*said, *verdicts, *_gain_of_weights(findings), *_paper(findings)]


def _verdicts(findings: Findings) -> list[str]:
    """Variants that are better or worse, by group; groups with fewer than two seeds are left out."""
    study, main = findings.results.study, findings.variants("main")
    others = " or ".join(dict.fromkeys(label(study.variant(variant.against)) for variant in main))
    said = []
    for name, places in findings.groups().items():
        verdicts: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
        for variant in main:
            paired = findings.paired(places, variant) if variant.name != variant.against else None
            if paired is not None and len(paired.differences) > 1:
                verdict = "better" if paired.low > 0 else "worse" if paired.high < 0 else "no clear difference"
                verdicts[verdict].append(f"{label(variant)} ({interval(paired)})")
        parts = [f"{verdict}: {', '.join(who)}" for verdict, who in verdicts.items() if who]
        if parts:
            start = f"Pools with {name}, points over {others}, mean over pools and students"
            said.append(f"{start}: {'; '.join(parts)}.")
    return said


def interval(paired: Paired) -> str:
    return f"{paired.mean:+.2f} ± {paired.half:.2f}" if len(paired.differences) > 1 else f"{paired.mean:+.2f}"


def _gain_of_weights(findings: Findings) -> list[str]:
    """Gain over the same losses with equal weights."""
    parts = []
    for variant, equal in findings.weighed():
        pairs = {name: findings.paired(places, variant, equal) for name, places in findings.groups().items()}
        known = [f"{interval(paired)} with {name}" for name, paired in pairs.items() if paired]
        if known:
            parts.append(f"{difference(variant, equal)} {', '.join(known)}")
    start = "Gain from the teachers' weights, in points over the same losses with equal weights"
    return [f"{start}: {'; '.join(parts)}."] if parts else []


def label(variant: Variant) -> str:
    """The printed label of a variant: that of the study file, else that of a strategy of this name, else its name."""
    return variant.label or (find(variant.name).label if variant.name == variant.strategy else variant.name)


def difference(variant: Variant, other: Variant) -> str:
    """Row label for the difference of two variants."""
    return f"{label(variant)} minus {label(other)}"


def _paper(findings: Findings) -> list[str]:
    """Comparison with the published gain over AVER."""
    said = []
    for variant in findings.confident():
        by: dict[str, list[str]] = {"within": [], "below": [], "above": []}
        for place in findings.places:
            paired = findings.paired([place], variant)
            if paired is not None and len(paired.differences) > 1:
                where = "below" if paired.high < PAPER_GAIN else "above" if paired.low > PAPER_GAIN else "within"
                by[where].append(f"{place[0].name}, {place[1].model}")
        count = sum(map(len, by.values()))
        if count:
            words = {
                "above": "more than that",
                "within": "compatible with it",
                "below": "less than that",
            }
            parts = [f"{words[k]} in {len(by[k])} of {count} ({'; '.join(by[k])})" for k in words if by[k]]
            said.append(
                f"The paper reports a gain of {PAPER_GAIN} points over AVER on average. "
                f"{label(variant)} gains {', '.join(parts)}."
            )
    return said


def bad_teacher_weight(findings: Findings, place: Place, variant: Variant, of: str) -> list[float] | None:
    """Summed weight of a pool's bad teachers per epoch, mean over seeds; `of` is a field of the records."""
    study = findings.results.study
    bad = [k for k, name in enumerate(place[0].teachers) if study.is_bad(name)]
    runs = [record[of] for record in findings.records(place, variant).values() if record[of] and record[of][0]]
    if not runs or not bad:
        return None
    return [mean(sum(run[epoch][k] for k in bad) for run in runs) for epoch in range(len(runs[0]))]


def bad_teachers_by_class(findings: Findings) -> dict[str, dict[tuple[Pool, str], list[float]]]:
    """CA-MKD's mean weight of each bad teacher by class: "logits" or "features" -> (pool, teacher) -> C values.

    Logit weights depend only on teachers and labels; feature weights are those of students after the last epoch.
    """
    study = findings.results.study
    weights: dict[str, dict[tuple[Pool, str], list[float]]] = {"logits": {}, "features": {}}
    for pool in study.pools:
        record = findings.results.pools.get(pool.name)
        runs = [
            trained["class_feature_weights"]
            for variant in findings.confident()
            for place in findings.places
            if place[0] == pool
            for trained in findings.records(place, variant).values()
            if trained.get("class_feature_weights")
        ]
        for k, teacher in enumerate(pool.teachers):
            if not study.is_bad(teacher):
                continue
            if record is not None:
                weights["logits"][pool, teacher] = record["confidence"][k]
            if runs:
                weights["features"][pool, teacher] = [
                    mean(values) for values in zip(*(run[k] for run in runs), strict=True)
                ]
    return weights


def badness_of(findings: Findings, pool: Pool, teacher: str) -> str:
    """Row label for a bad teacher."""
    return f"{pool.name}: {findings.results.study.teacher(teacher).badness}"


def core_hours(findings: Findings) -> float:
    """Core hours for teachers, caches and all cells, finished or not, at the median time of a student's finished runs.

    The median, because the wall time of some runs includes interruptions.
    """
    results = findings.results
    done: dict[str, list[float]] = {}
    for cell, record in results.cells.items():
        done.setdefault(cell.student, []).append(record["seconds"])
    every = [cell.student for cell in cells.cells(results.study)]
    students: float = sum(median(done[student]) for student in every if student in done)
    others: float = sum(record.get("seconds", 0.0) for record in (*results.teachers.values(), *results.pools.values()))
    return (students + others) / 3600


def mean_over(records: Sequence[Record], name: str) -> float | None:
    return mean(record[name] for record in records) if records else None
