"""`make study-report`: the study's page, and tables in docs/strategies.md, from committed results.

Reads only benchmarks/study/study.yaml and results.jsonl: equal results give equal bytes.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import doc_tables
from camkd_fast.experiments.study import records, spec, study_report, study_tables
from camkd_fast.experiments.study.findings import Findings, conclusions, core_hours

FOLDER = Path(__file__).parent / "study"
STRATEGIES = doc_tables.DOCS / "strategies.md"


def summary(findings: Findings) -> str:
    """The README's part: conclusions, and each strategy over all pools."""
    said = "".join(f"- {sentence}\n" for sentence in conclusions(findings))
    if not findings.results.cells:
        return said
    return f"{said}\n{doc_tables.markdown(study_tables.overview(findings))}\n{findings.results.origin}.\n"


def evidence(findings: Findings) -> str:
    """The part of docs/strategies.md: every table of the study."""
    parts = [summary(findings)]
    for student in findings.results.study.students if findings.results.cells else ():
        parts.append(f"{student.model}, test accuracy in percent by pool:\n\n")
        parts[-1] += doc_tables.markdown(study_tables.accuracy_by_pool(findings, student))
        parts.append(f"{student.model}, points over AVER from the same seed:\n\n")
        parts[-1] += doc_tables.markdown(study_tables.difference_by_pool(findings, student))
    for table, title in (("official", "At the official code's scale"), ("ablation", "Ablations")):
        parts.append(f"{title}:\n\n{doc_tables.markdown(study_tables.against_others(findings, table))}")
    for kind in ("logits", "features"):
        parts.append(f"CA-MKD's mean weight of bad teachers on {kind}, by class:\n\n")
        parts[-1] += doc_tables.markdown(study_tables.by_class(findings, kind))
    calibration = doc_tables.markdown(study_tables.calibration(findings))
    parts.append(f"Calibration, expected error of students on test images:\n\n{calibration}")
    hours, cost = f"{core_hours(findings):.1f} hours of one core", doc_tables.markdown(study_tables.cost(findings))
    parts.append(f"Cost, one thread, teachers from the cache; the whole study is {hours}:\n\n{cost}")
    parts.append("Pools and teachers:\n\n" + doc_tables.markdown(study_tables.pools(findings)))
    parts.append(doc_tables.markdown(study_tables.teachers(findings)))
    return "\n".join(parts)


def main() -> None:
    known = records.read(spec.load(FOLDER / "study.yaml"), FOLDER / "results.jsonl")
    findings = Findings(known)
    study_report.write(known, FOLDER / "report.html")
    STRATEGIES.write_text(doc_tables.replaced(STRATEGIES.read_text(), "evidence", evidence(findings)))


if __name__ == "__main__":
    main()
