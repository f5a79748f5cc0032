"""The balancer: pure functions from expert loads to placements, and ways to judge them; see docs/balancing.md."""
