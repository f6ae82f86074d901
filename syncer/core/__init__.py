"""Pure decisions: no clock, no dice, no I/O, no logging. The shell asks, the core answers."""
