"""The trainer image: three stages (prepare, train, publish) that share one workspace volume."""
