"""The foundation model with its task's head and its method's trainable weights."""
