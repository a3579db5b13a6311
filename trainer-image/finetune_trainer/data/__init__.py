"""From raw rows to tokenized, memory-mapped Arrow: read, convert, split, tokenize, store, report."""
