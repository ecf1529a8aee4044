"""A page about runs: one HTML file that needs no network, no account and no library.

  read.py      a run folder, however much of it is there -> RunData
  series.py    metrics.jsonl -> curves thin enough for a page
  sections.py  RunData -> pieces of HTML
  page.py      the whole page
  page.css, page.js
  wandb_report.py  the same run folders -> a W&B report
"""

from __future__ import annotations

from ssl_c2f.report.page import write_page

__all__ = ["write_page"]
