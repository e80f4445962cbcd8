"""From results to pages: tables, figures, report.md and one self-contained report.html. Knows no study."""
