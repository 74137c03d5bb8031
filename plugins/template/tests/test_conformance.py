"""dsv3's conformance suite on everything this backend claims, at the size for CI. Needs the package to be installed."""

from pathlib import Path

import dsv3.conformance

WAIVERS = Path(__file__).parents[1] / "waivers.txt"


def test_every_claim_holds() -> None:
    report = dsv3.conformance.run("__name__", level="L1", size="quick", waivers=str(WAIVERS))
    assert any(case.kernel == "__name__.first" and case.status == "passed" for case in report.cases)
    assert not report.failed, "\n".join(f"{c.id} {c.kernel}: {c.message}\n  again: {c.repeat}" for c in report.failed)
