"""The queue: jobs, grids, their pictures' records and inputs in one database."""
