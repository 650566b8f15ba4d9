"""The results of a run for people: a page, a table in the terminal, a table for documents. Made from artifacts alone."""

from influencespace.report.page import write_report
from influencespace.report.table import markdown_table, print_summary, summary_table

__all__ = ["markdown_table", "print_summary", "summary_table", "write_report"]
