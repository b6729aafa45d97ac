"""One page on what a run folder's steps did."""

from typing import TYPE_CHECKING

from birbal_ray import import_on_use

if TYPE_CHECKING:
    from birbal_ray.report.run import ReportResult, report

__all__ = ["ReportResult", "report"]
__getattr__ = import_on_use(__name__, {"ReportResult": "run", "report": "run"})
