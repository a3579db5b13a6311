"""dataset.personalData: `find` says where something is, `numbers` and `credentials` know what it looks like, `protect`
acts on it."""
