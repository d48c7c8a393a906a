"""Which of two models is better: paired statistics as pure functions."""
