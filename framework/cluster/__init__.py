"""Where workers run: marks, groups, placement, and the one edge at which Ray is touched."""
