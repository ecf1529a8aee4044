"""The paper: geometry of a time factor, phases, transfer of weights between geometries, and what it costs."""
