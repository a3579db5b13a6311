"""Evidence: metrics of the tuned model, the baseline that it is compared with, and the gate."""
