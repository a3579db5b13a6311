"""dataset.personalData: `find` says where something is, `numbers`, `credentials` and `names` know what it looks like,
`protect` acts on it."""
