"""The operator: a pure core (reconcile, render, sizing) in a thin shell (handlers, cluster, local)."""
