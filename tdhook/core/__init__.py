"""The core: models as pure functions, sites, transformations, targets and batching."""
