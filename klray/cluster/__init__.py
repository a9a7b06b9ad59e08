"""Ray itself: the connection, a pool of places, process groups, a cluster's file. No job's own code."""
