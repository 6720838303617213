"""F3: one Scorer, its optimizer and the ranks it lies on behind one small protocol; and the loop that trains with it."""
