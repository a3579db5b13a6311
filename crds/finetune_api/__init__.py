"""The contract between users, the operator and the trainer: `FineTuneJob` and the documents around it.

- `v1alpha1`: the resource itself (spec and status); the CRD is generated from it (`crd`).
- `plan`: what the operator tells a trainer pod. `progress`: what a trainer pod tells the operator.
- `constants`: every name that crosses a process border: phases, reasons, labels, exit codes.

This package imports nothing else of ours and nothing heavy: both images carry it.
"""
