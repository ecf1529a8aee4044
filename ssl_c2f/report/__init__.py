"""A page about runs: one HTML file that needs no network, no account and no library. And the same as a W&B report.

  read.py      a run folder -> RunData
  series.py    metrics.jsonl -> columns and curves
  tables.py    RunData -> rows of tables, for both
  sections.py  RunData -> HTML
  page.py      the page, with page.css and page.js
  wandb_report.py  run folders -> a W&B report
  summary.py   the table at the end of a run
"""

from __future__ import annotations

from ssl_c2f.report.page import write_page

__all__ = ["write_page"]
