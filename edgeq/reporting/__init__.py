"""Reports for people: one HTML page that opens from disk, or a model card, made of report.json.

``write_page`` and ``write_card`` read what ``edgeq export``, ``evaluate --json`` and
``bench --json`` wrote; nothing is measured here.
"""

from edgeq.reporting.card import write_card
from edgeq.reporting.page import write_page

__all__ = ["write_card", "write_page"]
