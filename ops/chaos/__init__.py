"""Faults on purpose: schedules of them, their injection, the record of what clients saw, and its judgement."""
