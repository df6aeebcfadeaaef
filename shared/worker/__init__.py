"""The process that computes: one model in memory, one job after the other."""
