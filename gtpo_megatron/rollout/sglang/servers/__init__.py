"""The servers of a run: processes, states, places, supervision."""
