"""The report of a run, and of a sweep: one HTML document that a person opens, on a phone or a desk, with no network.

What is computed from tensors is in ``hjepa.report.pictures``; a report is rendered without torch.
"""

from hjepa.report.document import Neighbours, Pictures, Report, read_journal, render
from hjepa.report.sweep import Branch, Sweep, render_sweep

__all__ = ["Branch", "Neighbours", "Pictures", "Report", "Sweep", "read_journal", "render", "render_sweep"]
