"""Before the first step: the command, the checks that need no weights, and the plan."""
