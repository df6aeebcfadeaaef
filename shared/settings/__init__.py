"""The settings of a job: the table that everybody reads, and what checks and parses values."""
