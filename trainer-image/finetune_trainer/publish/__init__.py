"""The result of a training as files that other tools load: export, model card, hashes, push."""
