"""F3: one Scorer, its optimizer and its ranks behind one small protocol; and the loop that trains with it."""
