"""Where the time of a train step goes: its regions labelled, a trace recorded, and the trace read."""
