"""The report of a run: one HTML document that a person opens, on a phone or a desk, with no network.

What is computed from tensors is in ``hjepa.report.pictures``; a report is rendered without torch.
"""

from hjepa.report.document import Neighbours, Pictures, Report, read_journal, render

__all__ = ["Neighbours", "Pictures", "Report", "read_journal", "render"]
