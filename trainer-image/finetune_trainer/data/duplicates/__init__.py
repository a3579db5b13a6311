"""Rows that say the same, or nearly: `signatures` of each by itself, `search` among all, `judge` for what follows."""
