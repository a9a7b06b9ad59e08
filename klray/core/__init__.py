"""The mathematics: noise schedules, the KL process, losses, time grids, solvers. Pure torch, without Ray."""
