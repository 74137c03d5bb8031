"""The conformance suite: aimed at any backend, it proves or refutes that its kernels are right."""

from dsv3.conformance.result import CaseResult, Report
from dsv3.conformance.run import run

__all__ = ["CaseResult", "Report", "run"]
