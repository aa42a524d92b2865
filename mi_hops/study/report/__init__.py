"""The report: one self-contained HTML file from a finished study (`page.write_report`).

It computes nothing that the results and ``summary.json`` do not hold, except averages over facts.
"""
