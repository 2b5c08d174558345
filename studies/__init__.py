"""Studies of quality: training runs by plan, their rows, and reports."""
