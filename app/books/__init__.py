"""The books: the proof of every unit, its repair, and the sale made anew."""
