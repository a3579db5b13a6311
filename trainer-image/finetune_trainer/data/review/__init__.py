"""dataset.review: labels that are probably wrong, and what people decided on them."""
