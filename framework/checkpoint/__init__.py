"""F2: training states on disk: staged, hashed, committed by one rename, verified before they are believed."""
