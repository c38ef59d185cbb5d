"""When a sample moves, how, and which of its steps are trained: all of it known on the host before anything runs."""
