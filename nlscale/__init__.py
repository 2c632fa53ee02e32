"""nlscale: distributed pretraining of continuum-memory Transformers."""
