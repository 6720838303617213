"""F2: what a run leaves behind to be read: its folder, figures, status, progress bar, trackers and report."""
