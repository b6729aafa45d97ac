"""One page on what a run folder's steps did."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from birbal_ray.report.run import ReportResult, report

__all__ = ["ReportResult", "report"]


def __getattr__(name: str) -> Any:
    """Import on first use: `birbal --help` must not wait for torch."""
    if name in __all__:
        from importlib import import_module

        module = "run"
        return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
